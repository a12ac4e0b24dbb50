"""The ops: one file each, with its settings, checks, registered schema, dispatch and public function."""
