"""Training tools other than losses."""

from .large_batch import LargeBatch as LargeBatch
from .large_batch import large_batch as large_batch
