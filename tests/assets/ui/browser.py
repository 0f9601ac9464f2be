"""Headless Chromium drives the UI as a person does. Run by `make test-ui`; needs chromium and chromedriver.

The tests are one story over one data folder and run in their order. With OAPL_SCREENSHOTS set to a folder, what a
person sees is kept there; that is how the pictures of docs/ui.md are made.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from asset_world import World
from dagster_site import Site, served, wait_for
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.policies import snapshots
from pipeline.recipe import load_recipe
from pipeline.runs.open import open_run

LOCATION = "__repository__@tiny"


@pytest.fixture(scope="session")
def site(world: World) -> Iterator[Site]:
    with served(world) as found:
        yield found


class Browser:
    def __init__(self, driver: WebDriver, site: Site) -> None:
        self.driver, self.site = driver, site

    def open(self, path: str) -> None:
        self.driver.get(self.site.address + path)

    def see(self, xpath: str, seconds: float = 60) -> WebElement:
        """The first element of that path that is shown."""

        def shown(driver: WebDriver) -> WebElement | None:
            return next((element for element in driver.find_elements(By.XPATH, xpath) if element.is_displayed()), None)

        return WebDriverWait(self.driver, seconds, ignored_exceptions=[Exception]).until(
            shown, f"{xpath} is not to be seen on {self.driver.current_url}"
        )

    def text(self, words: str, seconds: float = 60) -> WebElement:
        return self.see(f"//*[normalize-space(text())='{words}']", seconds)

    def keep(self, name: str) -> None:
        if folder := os.environ.get("OAPL_SCREENSHOTS"):
            time.sleep(2)  # animations
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="session")
def browser(site: Site) -> Iterator[Browser]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary and driver, "install Chromium: apt-get install chromium chromium-driver"
    options = Options()
    options.binary_location = binary
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1600,1000",
    ):
        options.add_argument(word)
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield Browser(chrome, site)
    chrome.quit()


def launch(browser: Browser, partition: str, change: Callable[[str], str], picture: str | None = None) -> str:
    """Launches a whole round from the launchpad with its config changed; returns the run's id."""
    browser.open(f"/locations/{LOCATION}/jobs/whole_round")
    button = browser.see("//button[contains(., 'Materialize all')]")
    button.find_element(By.XPATH, "./following::button[1]").click()
    browser.text("Open launchpad").click()
    browser.text("All defaults expanded")
    # The scaffolded config is in the editor that holds "ops:"; the page has others.
    editors = "return [...document.querySelectorAll('.CodeMirror')].find(e => e.CodeMirror.getValue().includes('ops:'))"
    editor = wait_for(lambda: browser.driver.execute_script(editors), 60, "the scaffolded config")
    text = browser.driver.execute_script("return arguments[0].CodeMirror.getValue()", editor)
    browser.driver.execute_script("arguments[0].CodeMirror.setValue(arguments[1])", editor, change(text))
    field = browser.see("//input[@placeholder='Partition']")
    field.click()
    field.send_keys(partition)
    field.send_keys(Keys.ENTER)
    browser.see(f"//*[contains(normalize-space(.), 'partition: {partition}')]")
    browser.text("No errors")
    time.sleep(2)  # the button takes a click only when the page has checked the config once more
    if picture:
        browser.keep(picture)
    buttons = browser.driver.find_elements(By.XPATH, "//button[contains(., 'Materialize')]")
    [button for button in buttons if button.is_displayed()][-1].click()
    wait_for(lambda: "/runs/" in browser.driver.current_url, 60, "the run's page")
    return browser.driver.current_url.rpartition("/")[2].partition("?")[0]


def test_lineage_shows_the_seven_assets(browser: Browser) -> None:
    browser.driver.set_window_size(2100, 900)
    browser.open("/asset-groups")
    for name in (
        "prompt_set",
        "frozen_policy",
        "rollouts",
        "verdicts",
        "rollout_dataset",
        "trained_policy",
        "pass_at_k",
    ):
        browser.text(name)
    browser.text("Hide navigation").click()
    browser.see("//input[contains(@placeholder, 'Jump to')]/following::button[1]").click()
    browser.keep("dagster-lineage")
    browser.driver.set_window_size(1600, 1000)


def test_a_round_is_launched_with_another_beta2(browser: Browser, site: Site) -> None:
    def change(text: str) -> str:
        assert "beta2: 0.2" in text  # the recipe's own value is offered
        assert str(site.world.root) not in text
        return text.replace("beta2: 0.2", "beta2: 0.35")

    run_id = launch(browser, "0001", change, "dagster-launchpad")
    browser.see("//*[contains(text(), 'completions,')]", 120)  # progress, while the step runs
    wait_for(lambda: site.status(run_id) in ("SUCCESS", "FAILURE"), 300, "the end of the round")
    assert site.status(run_id) == "SUCCESS"
    browser.see("//*[normalize-space(text())='Success']")
    browser.keep("dagster-run")
    run = site.world.run
    assert load_recipe(str(run.stage_recipe("learn", 1))).learning.beta2 == 0.35
    published = snapshots.newest(run, 1)
    assert published is not None and published.parent == snapshots.frozen_for(run, 1, 0).snapshot_id


def test_metadata_and_picture_of_the_round(browser: Browser) -> None:
    browser.open("/assets/pass_at_k?view=events&partition=0001")
    browser.text("pass@1")
    browser.keep("dagster-round")
    browser.text("picture").find_element(By.XPATH, "./following::*[contains(text(), 'Show')][1]").click()
    picture = browser.see("//img[starts-with(@src, 'data:image/png')]")
    natural, shown = browser.driver.execute_script(
        "return [arguments[0].naturalWidth, arguments[0].closest('[role=dialog]').clientWidth]", picture
    )
    assert 1000 <= natural < shown
    browser.keep("dagster-picture")


def test_the_schedule_is_turned_on(browser: Browser, site: Site) -> None:
    browser.open(f"/locations/{LOCATION}/schedules/nightly_retraining")
    browser.see("//*[contains(text(), '02:00')]")
    browser.keep("dagster-schedule")
    browser.see("//*[@role='switch'] | //label[contains(@class, 'switch')] | //input[@type='checkbox']/..").click()
    query = """query S($s: ScheduleSelector!) {
        scheduleOrError(scheduleSelector: $s) { ... on Schedule { scheduleState { status } } }
    }"""
    selector = {
        "repositoryName": "__repository__",
        "repositoryLocationName": "tiny",
        "scheduleName": "nightly_retraining",
    }

    def status() -> str:
        return str(site.ask(query, s=selector)["scheduleOrError"]["scheduleState"]["status"])

    wait_for(lambda: status() == "RUNNING", 30, "the schedule to run")


def processes_of(run: str) -> list[psutil.Process]:
    """Live processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if run in words and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def generating(site: Site) -> list[psutil.Process]:
    return [process for process in processes_of(str(site.world.run.rollouts(2))) if process.is_running()]


def slots(site: Site) -> list[str]:
    query = (
        '{ instance { concurrencyLimit(concurrencyKey: "engine") { claimedSlots { runId } pendingSteps { runId } } } }'
    )
    limit = site.ask(query)["instance"]["concurrencyLimit"]
    return [slot["runId"] for slot in limit["claimedSlots"]]


def test_a_running_generation_is_cancelled(browser: Browser, site: Site) -> None:
    run_id = launch(browser, "0002", lambda text: text.replace("prompts: 12", "prompts: 40"))
    wait_for(lambda: generating(site), 120, "generation")
    browser.see("//button[contains(., 'Terminate')]").click()
    time.sleep(2)  # the dialogue fades in
    buttons = browser.driver.find_elements(By.XPATH, "//button[contains(., 'erminate')]")
    [button for button in buttons if button.is_displayed()][-1].click()
    asked = time.monotonic()
    wait_for(lambda: site.status(run_id) == "CANCELED", 30, "the run to be cancelled")
    wait_for(lambda: not generating(site), 20, "its processes to end")
    wait_for(lambda: run_id not in slots(site), 20, "its slot to be free")
    assert time.monotonic() - asked < 20
    browser.see("//*[normalize-space(text())='Canceled']")


def test_a_killed_worker_fails_its_run(browser: Browser, site: Site) -> None:
    run_id = launch(browser, "0002", lambda text: text.replace("prompts: 12", "prompts: 40"))
    found = wait_for(lambda: generating(site), 120, "generation")
    leash = next(process for process in found if any(word.endswith("leash.py") for word in process.cmdline()))
    worker = leash.parent()
    assert worker is not None
    worker.kill()
    wait_for(lambda: not generating(site), 20, "what the worker started to end")
    wait_for(lambda: site.status(run_id) == "FAILURE", 60, "the run to be failed")
    wait_for(lambda: run_id not in slots(site), 40, "its slot to be free")


def test_rounds_chain_from_one_click(browser: Browser, site: Site) -> None:
    run = site.world.run
    open_run(run.data, load_recipe(str(run.recipe), ["rounds=4"]))
    # What the killed worker had committed is gone on with; round 3 is nobody's click.
    first = launch(browser, "0002", lambda text: text.replace("prompts: 12", "prompts: 40"))
    selector = {"repositoryName": "__repository__", "repositoryLocationName": "tiny", "sensorName": "next_round"}
    start = "mutation M($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename } }"
    assert site.ask(start, s=selector)["startSensor"]["__typename"] == "Sensor"
    unfinished = "{ runsOrError(filter: {statuses: [STARTING, STARTED]}) { ... on Runs { results { runId } } } }"
    together: set[int] = set()

    def finished() -> bool:
        together.add(len(site.ask(unfinished)["runsOrError"]["results"]))
        return run.evaluation(3).exists() and run.summary.read_text().count("snapshot_id") == 5

    wait_for(finished, 400, "rounds 2 and 3")
    assert site.status(first) == "SUCCESS" and max(together) == 1
    fourth, third = (snapshots.newest(run, number) for number in (3, 2))
    assert fourth is not None and third is not None and fourth.parent == third.snapshot_id
    ticks = """query T($s: SensorSelector!) {
        sensorOrError(sensorSelector: $s) { ... on Sensor { sensorState { ticks(limit: 1) { skipReason } } } }
    }"""

    def reason() -> str:
        found = site.ask(ticks, s=selector)["sensorOrError"]["sensorState"]["ticks"]
        return str(found[0]["skipReason"]) if found else ""

    wait_for(lambda: reason() == "all 4 rounds of the recipe are made", 60, "the sensor to rest")
