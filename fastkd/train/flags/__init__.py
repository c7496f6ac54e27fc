"""From the words of a command line to flags that go together."""
