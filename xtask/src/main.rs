//! The command line: `cargo xtask setup | build | run | lab | test | bench | soak | fuzz | dist |
//! lint`.
//!
//! xtask depends on neither libvirt nor aya nor the BPF toolchain, because it installs them. It
//! must build on a machine with only cargo and a C compiler. Every command runs the setup that it
//! needs, so a fresh clone needs one command.

mod bench;
mod bpf;
mod dist;
mod fetch;
mod fuzz;
mod hygiene;
mod hypervisor;
mod lab;
mod lint;
mod privilege;
mod programs;
mod progress;
mod run;
mod setup;
mod soak;
mod suites;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::setup::Profile;
use crate::suites::Suite;
use crate::workspace::Workspace;

/// The tasks of fence-xdp.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on Debian or Ubuntu; elsewhere, say what it would take
    Setup {
        /// The purpose of the machine [default: test; build on a hypervisor]
        #[arg(long = "for", value_enum, value_name = "PURPOSE")]
        profile: Option<Profile>,
        /// Also download the files that the tests would download when they first need them (the
        /// kernels of QEMU's guests, from Debian's archive)
        #[arg(long)]
        fetch: bool,
    },
    /// Build the BPF program and everything that runs in user space
    Build {
        /// Optimise, as for installation
        #[arg(long)]
        release: bool,
    },
    /// Run the daemon on a hypervisor, or the lab on any other machine
    Run(run::RunOptions),
    /// Keep a lab for experiments running: a cluster
    Lab(lab::LabOptions),
    /// Run all tests, or the named sets
    Test {
        /// The sets [default: all]
        #[arg(value_enum)]
        suites: Vec<Suite>,
        /// Arguments for the test programs, such as a part of a test's name or --nocapture
        #[arg(last = true)]
        filter: Vec<String>,
    },
    /// Measure the daemon beside stock's fence_virtd, or the kernel program's cost, and write a
    /// page of docs
    Bench(bench::BenchOptions),
    /// Load, floods and faults at random for an hour, with an observer that judges every success
    Soak(soak::SoakOptions),
    /// Search inputs that break a parser, or on which kernel program and user space differ
    Fuzz(fuzz::FuzzOptions),
    /// Build the packages for hypervisors and cluster nodes: target/dist
    Dist(dist::DistOptions),
    /// Check formatting, clippy, and the rules of this tree
    Lint {
        /// Check only the rules of this tree, which takes a second
        #[arg(long)]
        tidy: bool,
    },
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The name of a value on the command line.
fn name_of(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn perform(task: Task) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup { profile, fetch } => {
            let profile = profile.unwrap_or_else(setup::default_profile);
            setup::ensure(&workspace, profile)?;
            if fetch {
                fetch::run(&workspace)?;
            } else if profile == Profile::Test {
                progress::say(
                    "tests download the kernels of QEMU's guests when they first need them; `cargo xtask setup --fetch` does so now",
                );
            }
        }
        Task::Build { release } => {
            setup::ensure(&workspace, Profile::Build)?;
            let object = bpf::build(workspace.root())?;
            let mut cargo = workspace.cargo(&object);
            cargo.arg("build").args(release.then_some("--release"));
            progress::shown("building the workspace", cargo)?;
        }
        Task::Run(options) => return run::run(&workspace, &options),
        Task::Lab(options) => return lab::run(&workspace, &options),
        Task::Test { suites, filter } => return suites::run(&workspace, &suites, &filter),
        Task::Bench(options) => return bench::run(&workspace, &options),
        Task::Soak(options) => return soak::run(&workspace, &options),
        Task::Fuzz(options) => return fuzz::run(&workspace, &options),
        Task::Dist(options) => return dist::run(&workspace, &options),
        Task::Lint { tidy } => return if tidy { lint::tidy(&workspace) } else { lint::run(&workspace) },
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// The commands on a page: the text after the name, up to the end of the code or to a comment.
    fn commands(text: &str) -> Vec<&str> {
        let after = text.split("cargo xtask ").skip(1);
        let ends = |text: &str| text.find(['`', '\n', '#', ';', ')', ',']).unwrap_or(text.len());
        after.map(|text| text[..ends(text)].trim()).filter(|command| !command.is_empty()).collect()
    }

    #[test]
    fn every_command_in_the_pages_exists() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let is_page = |path: &std::path::PathBuf| path.extension().is_some_and(|end| end == "md");
        let rooms = ["", "docs", "docs/guide", "docs/reference", "docs/design", "docs/measured", "fuzz"];
        let folders = rooms.map(|room| top.join(room));
        let files = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()));
        let mut found = 0;
        for page in files.filter(is_page) {
            let text = fs::read_to_string(&page).unwrap();
            for command in commands(&text) {
                found += 1;
                let words = ["cargo xtask"].into_iter().chain(command.split_whitespace());
                if let Err(error) = Cli::try_parse_from(words) {
                    panic!("{}: cargo xtask {command}: {error}", page.display());
                }
            }
        }
        assert!(found > 30, "only {found} commands: the test misreads the pages");
    }
}
