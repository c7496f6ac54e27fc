"""The ops, one per file, each in the same order: schema, fake, implementation, autograd.Function, public function."""
