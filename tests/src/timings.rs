//! timings
