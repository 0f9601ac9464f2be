"""The browse page in a real browser, without network: what it shows is read from its DOM."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rollout_data import dataset, group, groups, prompt, prompt_name, provenance, verdict

from pipeline.errors import RequestError
from pipeline.prompts.files import write_prompts
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest
from pipeline.sharing.browse import pieces_of, write_page

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 127)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Dom(HTMLParser):
    """Elements of a page as (tag, attributes, text of everything inside)."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.found.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element[2].append(data)

    def of(self, kind: str) -> list[str]:
        """Texts of the elements with this class or #id."""
        return [
            "".join(text)
            for _, attributes, text in self.found
            if kind == f"#{attributes.get('id')}" or kind in attributes.get("class", "").split()
        ]


def browser(page: Path, state: str, scratch: Path, script: str = "") -> Dom:
    """The page's DOM after it has run with this state in its address, and after `script`."""
    if script:
        changed = page.with_name("scripted.html")
        changed.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
        page = changed
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "these tests drive Chromium: apt-get install chromium"
    profile = scratch / "profile"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--window-size=1400,900", "--dump-dom"]
    result = subprocess.run([*command, f"{page.as_uri()}#{state}"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return Dom(result.stdout)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Path:
    folder = tmp_path_factory.mktemp("browse")
    assert write_page(dataset(folder / "data", count=40), folder / "page.html", policy=policy) == (40, 40)
    return folder / "page.html"


def number_of(prompt_id: str) -> int:
    return next(number for number in range(40) if prompt_name(number) == prompt_id)


def test_a_group_is_shown_with_prompt_completions_and_verdicts(page: Path, tmp_path: Path) -> None:
    dom = browser(page, "q=question+10", tmp_path)
    assert dom.of("#shown") == ["1"] and dom.of("#of") == ["of 40 groups"]
    (head,) = dom.of("#prompt")
    assert f"prompt {prompt_name(10)}" in head and "question 10" in head and "reference: 10" in head
    cards = dom.of("card")
    assert len(cards) == 4
    for text, rollout in zip(cards, group(10), strict=True):
        judged = verdict(10, rollout)
        assert text.startswith(str(judged["status"]))
        assert f"{len(rollout.completion_tokens)} tokens, {rollout.finish_reason}" in text
        assert rollout.completion in text
        assert text.endswith("of prompt 10")


FILTERS = {
    "task=code": lambda n, rows: prompt(n).task == "code",
    "status=no_answer": lambda n, rows: any(verdict(n, r)["status"] == "no_answer" for r in rows),
    "status=no_answer,bad_reference": lambda n, rows: any(
        verdict(n, r)["status"] in ("no_answer", "bad_reference") for r in rows
    ),
    "minrate=0.9": lambda n, rows: n % 4 == 0,
    "maxrate=0": lambda n, rows: n % 4 == 1,
    "minlen=20": lambda n, rows: any(len(r.completion_tokens) >= 20 for r in rows),
    "maxlen=2&task=math": lambda n, rows: any(len(r.completion_tokens) <= 2 for r in rows) and prompt(n).task == "math",
    f"q={prompt_name(7)}": lambda n, rows: n == 7,
    "q=nothing+like+this": lambda n, rows: False,
}


@pytest.mark.parametrize("state", FILTERS)
def test_filters_show_what_fits(page: Path, tmp_path: Path, state: str) -> None:
    dom = browser(page, state, tmp_path)
    fits = [number for number, rows in enumerate(groups(40)) if FILTERS[state](number, rows)]
    assert dom.of("#shown") == [str(len(fits))]
    shown = {int(text.split()[-1]) for text in dom.of("q")}
    assert shown <= set(fits) and len(shown) == min(len(fits), len(dom.of("item")))
    assert bool(fits) == (not dom.of("empty"))


def test_shading_covers_every_token_with_its_log_probability(page: Path, tmp_path: Path) -> None:
    dom = browser(page, "q=question+10&shade=1", tmp_path)
    spans = [(text, a["data-lp"]) for _, a, (text, *_) in ((t, a, x) for t, a, x in dom.found if a.get("class") == "t")]
    expected = [
        (chr(token), str(min(255, round(-logprob / 0.05))))
        for rollout in group(10)
        for token, logprob in zip(rollout.completion_tokens, rollout.logprobs or [], strict=True)
    ]
    assert [text for text, _ in spans] == [text for text, _ in expected]
    # Half steps may round either way in float32.
    assert all(abs(int(found) - int(step)) <= 1 for (_, found), (_, step) in zip(spans, expected, strict=True))
    assert sum(found != step for (_, found), (_, step) in zip(spans, expected, strict=True)) <= len(spans) // 50


def test_keys_and_clicks_change_view_and_address(page: Path, tmp_path: Path) -> None:
    script = """
      const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      press("j"); press("j"); press("k"); press("s");
      document.querySelector("[data-status=no_answer]").click();
      document.body.dataset.address = location.hash;
      document.querySelector("#clear").click();
      press("j");
      document.body.dataset.later = location.hash;
    """
    dom = browser(page, "", tmp_path, script)
    body = next(attributes for tag, attributes, _ in dom.found if tag == "body")
    assert "status=no_answer" in body["data-address"] and "shade=1" in body["data-address"]
    assert "status=" not in body["data-later"] and "shade=1" in body["data-later"]
    chosen = re.search(r"g=(\w+)\.", body["data-later"])
    assert chosen and f"prompt {chosen[1]}" in dom.of("#prompt")[0]
    assert dom.of("#shown") == ["40"]


HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!-- <script> ]]> \u2028 ${1} __DATA__ __TITLE__ \x00\x1b[31m",
    "&lt;b&gt; <svg/onload=document.title='owned'>",
)


def test_hostile_completions_stay_text(tmp_path: Path) -> None:
    rows = [replace(row, completion=text) for row, text in zip(group(0), HOSTILE, strict=True)]
    with RolloutWriter(tmp_path / "data", provenance(), samples=4) as writer:
        writer.add_group(rows)
    write_prompts(tmp_path / "data" / "prompts.parquet", [replace(prompt(0), messages=(("user", HOSTILE[0]),))])
    write_page(locate(tmp_path / "data"), tmp_path / "page.html")
    dom = browser(tmp_path / "page.html", "", tmp_path)
    assert [title for tag, _, title in dom.found if tag == "title"] == [["Rollouts: step000000-0badcafe, round 0"]]
    assert not [tag for tag, _, _ in dom.found if tag in ("img", "svg")]
    assert len([tag for tag, _, _ in dom.found if tag == "script"]) == 1
    texts = dom.of("card")
    for text, expected in zip(texts, HOSTILE, strict=True):
        assert expected.replace("\x00", "\ufffd") in text or expected in text
    assert HOSTILE[0] in dom.of("#prompt")[0]


def test_without_a_tokenizer_the_page_has_strips_and_says_so(tmp_path: Path) -> None:
    write_page(dataset(tmp_path / "data", count=4), tmp_path / "page.html")
    dom = browser(tmp_path / "page.html", "shade=1", tmp_path)
    button = next(attributes for _, attributes, _ in dom.found if attributes.get("id") == "shade")
    assert "disabled" in button and "No tokenizer was at hand" in button["title"]
    assert len([tag for tag, _, _ in dom.found if tag == "canvas"]) == 4
    with pytest.raises(RequestError, match=r"no tokenizer\.json here"):
        write_page(locate(tmp_path / "data"), tmp_path / "page.html", policy=tmp_path)


def test_a_large_dataset_is_sampled_evenly_and_the_page_says_so(tmp_path: Path) -> None:
    place = dataset(tmp_path / "data", count=100, shard_rows=64)
    shown, total = write_page(place, tmp_path / "page.html", most_rollouts=50)
    assert (shown, total) == (12, 100)
    dom = browser(tmp_path / "page.html", "", tmp_path)
    assert dom.of("#sampled") == ["this page has 12 of 100 groups (48 rollouts), taken evenly"]
    assert "400 rollouts" in dom.of("#tokens")[0]
    write_page(place, tmp_path / "small.html", most_bytes=8_000)
    assert (tmp_path / "small.html").stat().st_size < (tmp_path / "page.html").stat().st_size


def test_only_the_rows_in_sight_are_in_the_list(tmp_path: Path) -> None:
    write_page(dataset(tmp_path / "data", count=600, shard_rows=512, tokens=2), tmp_path / "page.html")
    dom = browser(tmp_path / "page.html", "", tmp_path)
    assert dom.of("#shown") == ["600"]
    assert 10 <= len(dom.of("item")) < 40


def test_a_character_cut_into_tokens_is_one_piece(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    place = dataset(tmp_path / "data", count=1)
    pieces = pieces_of(place, tmp_path, read_manifest(place.rollouts))
    assert pieces is not None
    assert pieces(tokenizer.encode("a√b").ids) == [("a", 1), ("√", 3), ("b", 1)]
    # The cut at the end of a completion leaves a character unfinished.
    assert pieces(tokenizer.encode("√").ids[:2]) == [("\ufffd", 1), ("\ufffd", 1)]
    assert next(iter_batches(place.rollouts)).num_rows == 4
