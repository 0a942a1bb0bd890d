"""The commands of `iqmpc`, one file each; `iqmpc.cli` puts them together."""
