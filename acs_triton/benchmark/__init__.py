"""How fast sparse mode is beside every dense way to run the same network on a CPU: `acs-triton bench`."""
