"""The eBPF C sources of the datapath; a package so that the C ships in the wheel."""
