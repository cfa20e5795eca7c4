//! The `fence-daemon` binary.
fn main() {}
