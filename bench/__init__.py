"""The side-by-side measurement: one harness for dgls_torch and its peers, against a physical limit.

``python -m bench`` from the top folder lists the commands. No part of the wheel.
"""
