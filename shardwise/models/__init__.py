"""Reference models, their losses, and any `nn.Module` -> `ModelProfile`."""
