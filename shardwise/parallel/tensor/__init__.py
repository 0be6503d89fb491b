"""The tensor axis: ordinary modules are split inside their layers; proposed by structure, kept by proof."""
