//! The fencing daemon as a library.
