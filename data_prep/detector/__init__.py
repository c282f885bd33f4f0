"""Detection of vertebral bodies in a scan without a mask (docs/detector.md): data_prep's one room that uses JAX.

The network looks at every sagittal slice, `candidates` groups what it finds over the slices, and `chain` picks one
consistent column and names it from the sacrum up. JAX is loaded only when a scan is searched.
"""
