"""Speed and memory of patched models: named shapes without downloads, interleaved timing, limits to compare with."""
