"""The machines: discover them, measure them, and launch ranks on them. No torch."""
