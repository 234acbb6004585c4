"""Training tools other than losses."""

from .large_batch import LargeBatch as LargeBatch
from .large_batch import large_batch as large_batch
from .patch import patch as patch
from .patch import unpatch as unpatch
