"""State on disk, readable at any world size: safetensors files and a JSON manifest of boxes; nothing is unpickled."""
