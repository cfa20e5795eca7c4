//! What a person types: `cargo xtask setup | build | run | lab | test | bench | fuzz | lint`.
//!
//! Depends on neither libvirt nor aya nor the BPF toolchain, because it is what installs them: it
//! must build on a machine that has nothing but cargo and a C compiler. Every command calls the
//! setup that it needs itself, so a fresh clone needs one command, not two.

mod bench;
mod bpf;
mod fetch;
mod fuzz;
mod hypervisor;
mod lab;
mod lint;
mod own_config;
mod privilege;
mod programs;
mod progress;
mod run;
mod setup;
mod suites;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
        /// What the machine is to be able to do [default: test; build on a hypervisor]
        #[arg(long = "for", value_enum, value_name = "PURPOSE")]
        profile: Option<Profile>,
        /// Also download what the tests would when they first need it (the kernels of QEMU's
        /// guests, from Debian's archive)
        #[arg(long)]
        fetch: bool,
    },
    /// Build the BPF program and everything that runs in user space
    Build {
        /// Optimised, as it is meant to run
        #[arg(long)]
        release: bool,
    },
    /// Run the daemon on a hypervisor, or the lab on a machine that is none
    Run(run::Options),
    /// Keep something up to play with: a cluster
    Lab(lab::Options),
    /// Run the tests: all of them, or the sets named
    Test {
        /// Which sets [default: all]
        #[arg(value_enum)]
        suites: Vec<Suite>,
        /// Arguments for the test programs, such as a part of a test's name or --nocapture
        #[arg(last = true)]
        filter: Vec<String>,
    },
    /// Measure the daemon beside stock's fence_virtd, or what the kernel program costs, and write a
    /// page of docs
    Bench(bench::Options),
    /// Look for inputs that break a parser, or on which kernel and user space differ
    Fuzz(fuzz::Options),
    /// Formatting, clippy, and the rules of this tree
    Lint {
        /// Only the rules of this tree, which takes a second
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
                    "what QEMU's guests boot is downloaded when a test first needs it; `cargo xtask setup --fetch` does it now",
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
        Task::Fuzz(options) => return fuzz::run(&workspace, &options),
        Task::Lint { tidy } => return if tidy { lint::tidy(&workspace) } else { lint::run(&workspace) },
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// The commands in a page: what follows the name, up to the end of the code, or to what
    /// explains it.
    fn commands(text: &str) -> Vec<&str> {
        let after = text.split("cargo xtask ").skip(1);
        let ends = |text: &str| text.find(['`', '\n', '#', ';', ')', ',']).unwrap_or(text.len());
        after.map(|text| text[..ends(text)].trim()).filter(|command| !command.is_empty()).collect()
    }

    #[test]
    fn every_command_in_the_pages_is_one_that_there_is() {
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
        assert!(found > 30, "only {found} commands: the pages are read wrongly");
    }
}
