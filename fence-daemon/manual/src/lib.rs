//! The manual pages and the shells' completions of `fence-daemon`.
//!
//! Nothing is written twice: the commands and options come from the same definition as `--help`,
//! the configuration and the files from the pages in `docs/reference`. So the pages are current
//! whenever a package is built, and no copy of them is in the repository.

mod markdown;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use fence_client::cli::Cli;

/// The reference of the configuration, and that of the commands.
const CONFIGURATION: &str = include_str!("../../../docs/reference/configuration.md");
const COMMANDS: &str = include_str!("../../../docs/reference/commands.md");

/// The section of commands for administrators, and that of files.
const ADMINISTRATION: &str = "8";
const FORMATS: &str = "5";
/// What the head of each page says.
const MANUAL: &str = "fence-xdp";
/// Where the packages put the other pages.
const DOCS: &str = "/usr/share/doc/fence-xdp";

/// A generated file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Its place below the directory of all: `man/NAME.SECTION`, or `completions/SHELL/NAME`.
    pub path: PathBuf,
    /// All of it.
    pub content: Vec<u8>,
}

/// Every page and every completion. The pages show the date.
///
/// # Errors
/// A page in `docs` lacks a section that is needed here.
pub fn files(date: &str) -> Result<Vec<Generated>> {
    let mut command = Cli::command();
    command.build();
    let mut files = vec![page("fence_virt.conf", FORMATS, configuration(date)?), main_page(&command, date)?];
    for sub in command.get_subcommands() {
        files.push(command_page(&command, sub, date)?);
    }
    for (shell, name) in
        [(Shell::Bash, "bash/fence-daemon"), (Shell::Zsh, "zsh/_fence-daemon"), (Shell::Fish, "fish/fence-daemon.fish")]
    {
        let mut content = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "fence-daemon", &mut content);
        files.push(Generated { path: format!("completions/{name}").into(), content });
    }
    Ok(files)
}

fn page(name: &str, section: &str, content: Vec<u8>) -> Generated {
    // `man` runs tbl for the tables.
    let content = [b"'\\\" t\n".as_slice(), &content].concat();
    Generated { path: format!("man/{name}.{section}").into(), content }
}

/// The version that the foot of each page shows.
fn source() -> String {
    format!("fence-xdp {}", env!("CARGO_PKG_VERSION"))
}

/// The page of a command as clap tells it: name, synopsis, description, options, commands.
fn told_by_clap(command: &Command, date: &str) -> Result<Vec<u8>> {
    let man = Man::new(command.clone()).section(ADMINISTRATION).manual(MANUAL).source(source()).date(date);
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    Ok(text)
}

/// `fence-daemon(8)`.
fn main_page(command: &Command, date: &str) -> Result<Generated> {
    let mut text = told_by_clap(command, date)?;
    let mut rest = Roff::new();
    rest.control("SH", ["COMMANDS"]);
    for sub in command.get_subcommands() {
        rest.control("TP", []).text([bold(format!("fence-daemon-{}({ADMINISTRATION})", sub.get_name()))]);
        rest.text([roman(sub.get_about().map(ToString::to_string).unwrap_or_default())]);
    }
    for (page, heading) in [(COMMANDS, "Signals"), (CONFIGURATION, "Exit status"), (CONFIGURATION, "Files")] {
        markdown::section(&mut rest, section(page, heading)?);
    }
    rest.control("SH", ["ENVIRONMENT"]).control("TP", []).text([bold("RUST_LOG")]);
    rest.text([roman("Which messages are logged, instead of -d: a level, or TARGET=LEVEL with commas between.")]);
    let commands = command.get_subcommands().map(|sub| format!("fence-daemon-{}(8)", sub.get_name()));
    let others = ["fence_virt.conf(5)".to_owned()].into_iter().chain(commands);
    see_also(&mut rest, others.chain(["fence_xvm(8)".to_owned()]));
    rest.to_writer(&mut text)?;
    Ok(page("fence-daemon", ADMINISTRATION, text))
}

/// The page of a command: `fence-daemon-status(8)`, say.
fn command_page(main: &Command, sub: &Command, date: &str) -> Result<Generated> {
    let name = format!("{}-{}", main.get_name(), sub.get_name());
    let mut text = told_by_clap(&sub.clone().display_name(name.clone()), date)?;
    let mut rest = Roff::new();
    see_also(&mut rest, ["fence-daemon(8)", "fence_virt.conf(5)"].map(str::to_owned));
    rest.to_writer(&mut text)?;
    Ok(page(&name, ADMINISTRATION, text))
}

/// `fence_virt.conf(5)`: the page of the configuration. What belongs to the command is left out.
fn configuration(date: &str) -> Result<Vec<u8>> {
    let mut roff = Roff::new();
    roff.control("TH", ["fence_virt.conf", FORMATS, date, &source(), MANUAL]);
    roff.control("SH", ["NAME"]).text([roman("fence_virt.conf - the configuration of fence-daemon")]);
    let (head, _) = CONFIGURATION.split_once("\n## ").context("the configuration's page has no sections")?;
    let (_, introduction) = head.split_once('\n').context("the configuration's page has no introduction")?;
    roff.control("SH", ["DESCRIPTION"]);
    // The table of contents is of links within the page.
    let is_link = |line: &&str| !line.starts_with("- [");
    markdown::body(&mut roff, &introduction.lines().filter(is_link).collect::<Vec<_>>().join("\n"));
    let of_the_command = ["Command line\n", "Exit status\n", "See also\n"];
    for part in CONFIGURATION.split("\n## ").skip(1) {
        if !of_the_command.iter().any(|heading| part.starts_with(heading)) {
            markdown::section(&mut roff, part);
        }
    }
    see_also(&mut roff, ["fence-daemon(8)", "fence_xvm(8)"].map(str::to_owned));
    Ok(roff.render().into_bytes())
}

/// A second-level section of a page, from its heading on.
fn section(page: &'static str, heading: &str) -> Result<&'static str> {
    let parts = page.split("\n## ").skip(1);
    let found = parts.into_iter().find(|part| part.lines().next() == Some(heading));
    found.with_context(|| format!("docs/reference has no section {heading:?}"))
}

/// The last section.
fn see_also(roff: &mut Roff, others: impl IntoIterator<Item = String>) {
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(format!("{},", others.into_iter().collect::<Vec<_>>().join(", ")))]);
    roff.text([roman(format!("and the guides in {DOCS}."))]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str) -> String {
        let files = files("2026-01-01").unwrap();
        let file = files.iter().find(|file| file.path.ends_with(name)).unwrap_or_else(|| panic!("no {name}"));
        // As it is read: a hyphen that stays one is written with a backslash.
        String::from_utf8(file.content.clone()).unwrap().replace("\\-", "-").replace("\\f[B]", "").replace("\\fB", "")
    }

    #[test]
    fn every_option_and_command_has_its_place() {
        let mut command = Cli::command();
        command.build();
        let main = text("fence-daemon.8");
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            if let Some(long) = argument.get_long() {
                assert!(main.contains(&format!("--{long}")), "{long}");
            }
        }
        assert!(command.get_subcommands().count() > 4);
        for sub in command.get_subcommands() {
            let name = sub.get_name();
            assert!(main.contains(&format!("fence-daemon-{name}(8)")), "{name}");
            let page = text(&format!("fence-daemon-{name}.8"));
            for argument in sub.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let long =
                    argument.get_long().map_or_else(|| argument.get_id().to_string(), |long| format!("--{long}"));
                assert!(page.to_lowercase().contains(&long.to_lowercase()), "{name} {long}");
            }
        }
    }

    #[test]
    fn every_key_of_the_configuration_has_an_entry() {
        let page = text("fence_virt.conf.5");
        let keys: Vec<_> = CONFIGURATION.lines().filter_map(|line| line.strip_prefix("#### ")).collect();
        assert!(keys.len() > 60, "{keys:?}");
        for key in keys {
            let key = key.trim_matches('`');
            assert!(page.lines().any(|line| line == format!(".SS {key}")), "{key}");
        }
    }

    #[test]
    fn completions_know_the_commands() {
        for shell in ["bash/fence-daemon", "zsh/_fence-daemon", "fish/fence-daemon.fish"] {
            let script = text(shell);
            assert!(script.contains("check-config") && script.contains("from-guest"), "{shell}");
        }
    }
}
