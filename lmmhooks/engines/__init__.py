"""What makes each kind of method run: hooks, caches, shapes. No engine knows a single method."""
