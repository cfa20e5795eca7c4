//! The guides in docs, parsed: commands and where they are typed, files, and the expected output.
//! [`stage`] plays a guide.
//!
//! A page has three kinds of blocks:
//!
//! * `console`: commands after a prompt that names the place (`root@node1:~# COMMAND`), each with
//!   its exact output below. `...` stands for any text in a line, and for any lines on a line of
//!   its own. A command exits with 0; without output below, it prints nothing. A line that ends
//!   with `\` continues in the next one, after `> `. In `console again`, the last command repeats
//!   until it prints this output.
//! * `LANGUAGE USER@HOST:PATH`: a file's content. The line above the block names the file too.
//! * `diagram`, `example`: lines for the eye.

use anyhow::{Context, Result, bail, ensure};

pub mod stage;

/// A page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guide {
    /// The steps in their order.
    pub steps: Vec<Step>,
}

/// One step of a reader who follows the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it stands: the line's number.
    pub line: usize,
    /// The machine, as the page calls it.
    pub host: String,
    /// The act on that machine.
    pub act: Act,
}

impl Step {
    /// Whether this command is typed.
    pub fn types(&self, command: &str) -> bool {
        matches!(&self.act, Act::Type(typed) if typed.command == command)
    }
}

/// An act of the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// A command.
    Type(Typed),
    /// A file is written: its path and its content.
    Write(String, String),
}

/// A command and what it prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Typed {
    /// Who types it.
    pub user: String,
    /// Where: an absolute path, or one that begins with `~`.
    pub directory: String,
    /// The command, continued lines joined.
    pub command: String,
    /// The output that the page shows.
    pub shown: Vec<String>,
    /// Whether it is typed until it prints that.
    pub again: bool,
}

impl Guide {
    /// Reads a page of docs, in which these machines occur.
    pub fn read(page: &str, hosts: &[&str]) -> Result<Self> {
        Self::read_if(page, hosts, |_| true)
    }

    /// As [`Self::read`], but only the chapters (`## TITLE`) whose title is `wanted`. What is above
    /// the first one has no title.
    pub fn read_if(page: &str, hosts: &[&str], wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let path = crate::tools::workspace().join("docs/guide").join(page);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Self::parse(&chapters(&text, wanted), hosts).with_context(|| path.display().to_string())
    }

    /// Takes a page apart.
    pub fn parse(text: &str, hosts: &[&str]) -> Result<Self> {
        let mut steps = Vec::new();
        let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
        let mut above = "";
        while let Some((number, line)) = lines.next() {
            let Some(info) = line.trim_start().strip_prefix("```") else {
                prose(line, hosts).with_context(|| format!("line {number}: {line}"))?;
                above = if line.trim().is_empty() { above } else { line };
                continue;
            };
            let block = FencedBlock::read(number, info, &mut lines)?;
            steps.extend(block.steps(above, hosts).with_context(|| format!("the block in line {number}"))?);
        }
        ensure!(!steps.is_empty(), "nothing is typed on this page");
        Ok(Self { steps })
    }

    /// The content of a file that the page has written.
    #[must_use]
    pub fn file(&self, host: &str, path: &str) -> Option<&str> {
        self.steps.iter().filter(|step| step.host == host).find_map(|step| match &step.act {
            Act::Write(written, content) if written == path => Some(content.as_str()),
            Act::Write(..) | Act::Type(_) => None,
        })
    }
}

/// A page in which the chapters that are not wanted are empty lines.
fn chapters(text: &str, wanted: impl Fn(&str) -> bool) -> String {
    let mut is_wanted = wanted("");
    let line = |line: &str| {
        if let Some(title) = line.strip_prefix("## ") {
            is_wanted = wanted(title);
        }
        if is_wanted { format!("{line}\n") } else { "\n".to_owned() }
    };
    text.lines().map(line).collect()
}

/// A line outside of blocks is for reading alone.
fn prose(line: &str, hosts: &[&str]) -> Result<()> {
    ensure!(!line.starts_with("    ") && !line.starts_with('\t'), "an indented block: fence it, and say what it is");
    ensure!(!line.trim_start().starts_with("~~~"), "a block in a fence of another kind: use ```");
    ensure!(Prompt::find(line, hosts)?.is_none(), "a command outside of a block");
    Ok(())
}

/// A fenced block.
struct FencedBlock<'t> {
    info: &'t str,
    lines: Vec<(usize, &'t str)>,
}

impl<'t> FencedBlock<'t> {
    fn read(first: usize, info: &'t str, lines: &mut impl Iterator<Item = (usize, &'t str)>) -> Result<Self> {
        let mut content = Vec::new();
        for (number, line) in lines {
            if line.trim() == "```" {
                return Ok(Self { info: info.trim(), lines: content });
            }
            ensure!(!line.trim_start().starts_with("```"), "line {number}: a block begins inside of another");
            content.push((number, line));
        }
        bail!("the block in line {first} does not end");
    }

    /// `above` is the last line of prose.
    fn steps(&self, above: &str, hosts: &[&str]) -> Result<Vec<Step>> {
        let words: Vec<_> = self.info.split_whitespace().collect();
        match words.as_slice() {
            ["console"] => self.typed(false, hosts),
            ["console", "again"] => self.typed(true, hosts),
            ["diagram" | "example"] => {
                for (_, line) in &self.lines {
                    ensure!(Prompt::find(line, hosts)?.is_none(), "a command in a diagram or an example");
                }
                Ok(Vec::new())
            }
            [_language, place] => Ok(vec![self.file(place, above, hosts)?]),
            _ => bail!(
                "it is neither `console`, nor `LANGUAGE USER@HOST:PATH`, nor `diagram`, nor `example`: `{}`",
                self.info
            ),
        }
    }

    fn file(&self, place: &str, above: &str, hosts: &[&str]) -> Result<Step> {
        let parts = place.split_once('@').and_then(|(_, rest)| rest.split_once(':'));
        let Some((host, path)) = parts.filter(|(_, path)| path.starts_with('/')) else {
            bail!("`{place}` is no USER@HOST:PATH");
        };
        ensure!(hosts.contains(&host), "no machine of this guide: {host}");
        let told = above.contains(&format!("`{path}`")) && above.contains(&format!("**{host}**"));
        ensure!(told, "the line above must tell **{host}** and `{path}`: {above}");
        let content = self.lines.iter().map(|(_, line)| format!("{line}\n")).collect();
        let line = self.lines.first().context("an empty file")?.0;
        Ok(Step { line, host: host.to_owned(), act: Act::Write(path.to_owned(), content) })
    }

    fn typed(&self, again: bool, hosts: &[&str]) -> Result<Vec<Step>> {
        let mut steps: Vec<Step> = Vec::new();
        let mut lines = self.lines.iter();
        while let Some(&(number, line)) = lines.next() {
            let at = || format!("line {number}: {line}");
            if let Some(prompt) = Prompt::find(line, hosts).with_context(at)? {
                let mut command = prompt.rest.to_owned();
                while let Some(begun) = command.strip_suffix('\\') {
                    let next = lines.next().and_then(|(_, next)| next.strip_prefix("> "));
                    command = format!("{begun}{}", next.with_context(at).context("it goes on in no line with `> `")?);
                }
                let (user, directory) = (prompt.user.to_owned(), prompt.directory.to_owned());
                let typed = Typed { user, directory, command, shown: Vec::new(), again: false };
                steps.push(Step { line: number, host: prompt.host.to_owned(), act: Act::Type(typed) });
            } else {
                let words = line.trim_start();
                ensure!(!words.starts_with("# ") && !words.starts_with("$ "), "{}: a command without a place", at());
                let Some(Step { act: Act::Type(typed), .. }) = steps.last_mut() else {
                    bail!("{}: the block does not begin with a command", at());
                };
                typed.shown.push(line.to_owned());
            }
        }
        let Some(Step { act: Act::Type(last), .. }) = steps.last_mut() else { bail!("nothing is typed in it") };
        ensure!(!again || !last.shown.is_empty(), "typed again until it shows what?");
        last.again = again;
        Ok(steps)
    }
}

/// `USER@HOST:DIRECTORY# REST`.
struct Prompt<'t> {
    user: &'t str,
    host: &'t str,
    directory: &'t str,
    rest: &'t str,
}

impl<'t> Prompt<'t> {
    /// The prompt that a line begins with, if any.
    fn find(line: &'t str, hosts: &[&str]) -> Result<Option<Self>> {
        let Some((prompt, rest)) = line.trim_start().split_once(' ') else { return Ok(None) };
        let Some((before, sign)) = prompt.split_at_checked(prompt.len().saturating_sub(1)) else { return Ok(None) };
        let Some((user, place)) = before.split_once('@') else { return Ok(None) };
        let Some((host, directory)) = place.split_once(':') else { return Ok(None) };
        if !matches!(sign, "#" | "$") {
            return Ok(None);
        }
        ensure!(hosts.contains(&host), "no machine of this guide: {host}");
        ensure!((user == "root") == (sign == "#"), "root's prompt ends with #, and only root's");
        ensure!(directory.starts_with(['~', '/']), "no directory: {directory}");
        ensure!(!rest.trim().is_empty(), "a prompt without a command");
        Ok(Some(Self { user, host, directory, rest }))
    }
}

/// Compares printed and shown output. Blanks count as one, empty lines do not count. An error has
/// the first line that is missing or too much.
pub fn compare(shown: &[String], printed: &str) -> Result<()> {
    fn squeezed(line: &str) -> Option<String> {
        let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
        (!line.is_empty()).then_some(line)
    }
    let shown: Vec<_> = shown.iter().filter_map(|line| squeezed(line)).collect();
    let printed: Vec<_> = printed.lines().filter_map(squeezed).collect();
    let mut furthest = 0;
    if lines_match(&shown, &printed, 0, &mut furthest) {
        return Ok(());
    }
    match shown.get(furthest) {
        Some(line) => bail!("not as shown: `{line}` is not there, or not in its place"),
        None => bail!("more is printed than is shown"),
    }
}

/// `at` of `shown` are matched already; `furthest` is the most that ever were.
fn lines_match(shown: &[String], printed: &[String], at: usize, furthest: &mut usize) -> bool {
    *furthest = (*furthest).max(at);
    match (shown.get(at), printed) {
        (None, rest) => rest.is_empty(),
        (Some(any), _) if any == "..." => {
            (0..=printed.len()).any(|skipped| lines_match(shown, &printed[skipped..], at + 1, furthest))
        }
        (Some(line), [first, rest @ ..]) => line_matches(line, first) && lines_match(shown, rest, at + 1, furthest),
        (Some(_), []) => false,
    }
}

/// Whether a line is as shown, where `...` is any text.
fn line_matches(shown: &str, printed: &str) -> bool {
    let Some((start, rest)) = shown.split_once("...") else { return shown == printed };
    let Some(mut printed) = printed.strip_prefix(start) else { return false };
    let parts: Vec<_> = rest.split("...").collect();
    let Some((end, middle)) = parts.split_last() else { return false };
    for part in middle {
        let Some(found) = printed.find(part) else { return false };
        printed = &printed[found + part.len()..];
    }
    printed.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: [&str; 2] = ["hypervisor", "node1"];

    fn refused(text: &str) -> String {
        format!("{:#}", Guide::parse(text, &HOSTS).unwrap_err())
    }

    #[test]
    fn a_page_is_taken_apart() {
        let text = "# A page\n\nOn the hypervisor:\n\n```console\nroot@hypervisor:~# one \\\n> two\nprinted\n\
                    user@node1:/tmp$ three\n```\n\n**hypervisor**, `/etc/x.conf`:\n\n```conf root@hypervisor:/etc/x.conf\na {\n}\n```\n\n\
                    ```diagram\n+--+\n```\n```console again\nroot@node1:~# four\n...\n```\n";
        let guide = Guide::parse(text, &HOSTS).unwrap();
        let typed = |line, user: &str, host: &str, directory: &str, command: &str, shown: &[&str], again| Step {
            line,
            host: host.to_owned(),
            act: Act::Type(Typed {
                user: user.to_owned(),
                directory: directory.to_owned(),
                command: command.to_owned(),
                shown: shown.iter().map(|&line| line.to_owned()).collect(),
                again,
            }),
        };
        let written = Act::Write("/etc/x.conf".to_owned(), "a {\n}\n".to_owned());
        let expected = [
            typed(6, "root", "hypervisor", "~", "one two", &["printed"], false),
            typed(9, "user", "node1", "/tmp", "three", &[], false),
            Step { line: 15, host: "hypervisor".to_owned(), act: written },
            typed(23, "root", "node1", "~", "four", &["..."], true),
        ];
        assert_eq!(guide.steps, expected);
        assert_eq!(guide.file("hypervisor", "/etc/x.conf"), Some("a {\n}\n"));
        assert_eq!(guide.file("node1", "/etc/x.conf"), None);
    }

    #[test]
    fn a_chapter_is_played_alone_and_keeps_its_lines() {
        let block = |command: &str| format!("```console\nroot@node1:~# {command}\n```\n");
        let text = format!("{}## One\n{}## Two\n{}", block("zero"), block("one"), block("two"));
        let lines = |wanted: &dyn Fn(&str) -> bool| -> Vec<usize> {
            let guide = Guide::parse(&chapters(&text, wanted), &HOSTS).unwrap();
            guide.steps.iter().map(|step| step.line).collect()
        };
        assert_eq!(lines(&|_| true), [2, 6, 10]);
        assert_eq!(lines(&|title| title == "One"), [6]);
        assert_eq!(lines(&|title| title != "One"), [2, 10]);
    }

    /// What might be a command is played, or the page is refused.
    #[test]
    fn a_block_that_cannot_be_played_is_an_error() {
        let ok = "```console\nroot@node1:~# true\n```\n";
        for (text, why) in [
            ("```console\nroot@node3:~# true\n```\n", "no machine"),
            ("```console\nroot@node1:~$ true\n```\n", "root's prompt"),
            ("```console\nuser@node1:~# true\n```\n", "root's prompt"),
            ("```console\n# true\n```\n", "without a place"),
            ("```console\ntrue\n```\n", "does not begin with a command"),
            ("```console\nroot@node1:~# one \\\ntwo\n```\n", "goes on in no line"),
            ("```console\nroot@node1:~# true\n", "does not end"),
            ("```console\n```\n", "nothing is typed"),
            ("```console again\nroot@node1:~# true\n```\n", "until it shows what"),
            ("```\ntrue\n```\n", "neither"),
            ("```sh\ntrue\n```\n", "neither"),
            ("```console twice now\nroot@node1:~# true\n```\n", "neither"),
            ("~~~\ntrue\n~~~\n", "another kind"),
            ("    true\n", "an indented block"),
            ("\ttrue\n", "an indented block"),
            ("root@node1:~# true\n", "outside of a block"),
            ("```diagram\nroot@node1:~# true\n```\n", "in a diagram"),
            ("**node1**, `/x`:\n```conf root@node3:/x\na\n```\n", "no machine"),
            ("**node1**, `/y`:\n```conf root@node1:/x\na\n```\n", "must tell"),
            ("**hypervisor**, `/x`:\n```conf root@node1:/x\na\n```\n", "must tell"),
            ("**node1**, `/x`:\n```conf root@node1:x\na\n```\n", "no USER@HOST:PATH"),
            ("**node1**, `/x`:\n```conf root@node1:/x\n```\n", "an empty file"),
        ] {
            let said = refused(&format!("{ok}{text}"));
            assert!(said.contains(why), "{text}: {said}");
        }
        assert!(refused("# Nothing\n").contains("nothing is typed"));
    }

    #[test]
    fn printed_output_is_compared_line_by_line() {
        let same = |shown: &[&str], printed: &str| {
            let shown: Vec<_> = shown.iter().map(|&line| line.to_owned()).collect();
            compare(&shown, printed)
        };
        for (shown, printed) in [
            (&[][..], ""),
            (&[], "\n  \n"),
            (&["a b"], "a  b \n"),
            (&["..."], ""),
            (&["..."], "a\nb\n"),
            (&["...", "c", "..."], "a\nb\nc\nd\n"),
            (&["a ... d"], "a b c d"),
            (&["... c ..."], "a b c d"),
            (&["a...a"], "aa"),
            (&["...", "a", "b"], "a\nc\na\nb\n"),
        ] {
            assert!(same(shown, printed).is_ok(), "{shown:?} {printed:?}");
        }
        for (shown, printed, why) in [
            (&[][..], "a", "more is printed"),
            (&["a"], "", "`a` is not there"),
            (&["a"], "a\nb", "more is printed"),
            (&["a", "b"], "a\nc", "`b` is not there"),
            (&["...", "c"], "a\nc\nd", "more is printed"),
            (&["a...a"], "a", "`a...a` is not there"),
            (&["a ... d"], "a b c", "is not there"),
            (&["...", "b", "..."], "a", "`b` is not there"),
        ] {
            let said = same(shown, printed).unwrap_err().to_string();
            assert!(said.contains(why), "{shown:?} {printed:?}: {said}");
        }
    }
}
