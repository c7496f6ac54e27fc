"""The ops, one per file, each in the same order: schema, fake, implementation, autograd.Function, public function.

Where the way of a device is long it lies in drivers/, as <op>_<device>.py; and so does the row primitive of them all.
"""
