"""Training, evaluation and reports."""

from data_prep.versions import require_versions

require_versions()
