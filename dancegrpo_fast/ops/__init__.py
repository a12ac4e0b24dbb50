"""The ops: one file each, with its settings, checks, registered schema, dispatch and public function."""

from ..backends import check_torch

check_torch()
