"""Training stages of the speech adapter; each is a Task for `core_llm.train.fit`."""
