"""Vertebral bodies found in a scan that has no mask: the one place of data_prep with a network (docs/detector.md).

A network looks at every sagittal slice, `candidates` groups what it sees over the slices, and `chain` picks one
consistent column and names it from the sacrum up. JAX is loaded only when a scan is looked at.
"""
