//! Two hypervisors on one segment.
