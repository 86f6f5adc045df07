"""What tests share: models, reference methods, devices, faults, servers."""
