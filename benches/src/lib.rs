//! Measurements of the mesh against a peer and a physical limit, in the same run.
