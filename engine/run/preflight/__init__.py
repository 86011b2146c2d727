"""Whether the machines can carry a run, in a minute: clocks, memory, disks, links, devices, versions."""
