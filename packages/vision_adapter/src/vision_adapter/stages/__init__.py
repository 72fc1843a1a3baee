"""Training stages of the vision adapter; each is a Task for `core_llm.train.fit`."""
