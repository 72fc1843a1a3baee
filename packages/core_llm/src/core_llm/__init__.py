"""The Llama core: a text model that adapters attach to without changing it."""
