"""Kernels: one device's view, arrays in and arrays out. ``dispatch`` says which implementation runs."""
