//! The daemon with fault points: tests let it die in the middle of a request. The library's `fault`
//! lists the steps.

#[path = "../main.rs"]
mod daemon;

fn main() -> std::process::ExitCode {
    daemon::main()
}
