"""Own kernels for decoding on a CPU, in C: compiled once per machine in about a second, kept in the user's cache."""
