//! What a person types: setup, build, run, test, lint.
fn main() {}
