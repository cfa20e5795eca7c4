//! The daemon, for tests that want it to die in the middle of a request (the library's `fault` has the steps).

#[path = "../main.rs"]
mod daemon;

fn main() -> std::process::ExitCode {
    daemon::main()
}
