"""Projections into and out of the packed rows of active pairs."""

from pallas_kernels.routed_projection.api import project_in as project_in
from pallas_kernels.routed_projection.api import project_out as project_out
