"""The command line: a module a noun; its words are a contract."""
