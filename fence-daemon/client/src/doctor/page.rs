//! Prints the findings as a page: one line each, remedies indented below, the summary last.

use super::finding::{Diagnosis, Finding, Side, State};
use crate::screen::table::{Look, Screen};
use crate::screen::words::{harmless, wrapped};

/// Columns of the state and of the check's name.
const STATE: usize = 8;
const CHECK: usize = 14;
/// The width of a remedy without a terminal, in columns.
const WIDTH: usize = 110;

/// The whole page.
#[must_use]
pub fn render(diagnosis: &Diagnosis, screen: Screen) -> String {
    let mut page = String::new();
    for finding in &diagnosis.findings {
        page.push_str(&told(finding, screen));
    }
    page.push('\n');
    page.push_str(&screen.paint(look_of(diagnosis.verdict), &summary(diagnosis)));
    page.push('\n');
    page
}

fn look_of(state: State) -> Look {
    match state {
        State::Ok => Look::Good,
        State::Unknown => Look::Dim,
        State::Warning => Look::Warn,
        State::Wrong => Look::Bad,
    }
}

fn told(finding: &Finding, screen: Screen) -> String {
    let state = screen.paint(look_of(finding.state), finding.state.name());
    let blanks = " ".repeat(STATE.saturating_sub(finding.state.name().len()));
    let indent = STATE + CHECK;
    let seen = indented(&finding.seen, indent, screen);
    let mut text = format!("{state}{blanks}{:<CHECK$}{}\n", finding.check, seen.trim_start());
    if let Some(remedy) = &finding.remedy {
        text.push_str(&indented(remedy, indent + 2, screen));
        text.push('\n');
    }
    for command in &finding.commands {
        // Commands are never wrapped, so that they can be copied.
        let command = screen.paint(Look::Heading, &harmless(command));
        text.push_str(&format!("{}# {command}\n", " ".repeat(indent + 4)));
    }
    text
}

/// Wraps a text and indents each line.
fn indented(text: &str, indent: usize, screen: Screen) -> String {
    let room = screen.width.unwrap_or(WIDTH).saturating_sub(indent).max(30);
    let indent = " ".repeat(indent);
    wrapped(text, room).iter().map(|line| format!("{indent}{line}")).collect::<Vec<_>>().join("\n")
}

fn summary(diagnosis: &Diagnosis) -> String {
    let several = |count: usize, one: &str, many: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {many}")),
    };
    let parts = [
        several(diagnosis.count(State::Wrong), "thing is wrong", "things are wrong"),
        several(diagnosis.count(State::Warning), "warning", "warnings"),
        several(diagnosis.count(State::Unknown), "is unknown", "are unknown"),
        several(diagnosis.count(State::Ok), "is well", "are well"),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    let place = match diagnosis.side {
        Side::Hypervisor => "on this hypervisor",
        Side::Guest => "in this guest",
    };
    let first = if diagnosis.verdict == State::Wrong { "" } else { "nothing is wrong " };
    if first.is_empty() {
        format!("{place}: {}", parts.join(", "))
    } else {
        format!("{first}{place}: {}", parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis() -> Diagnosis {
        let findings = vec![
            Finding::ok("key", "4096 bytes"),
            Finding::wrong("daemon", "no daemon\nanswers", "it does not run: start it")
                .command("systemctl start fence-daemon"),
            Finding::unknown("firewall", "no nft", "install it"),
        ];
        Diagnosis::new(Side::Hypervisor, findings)
    }

    #[test]
    fn a_line_each_the_remedy_below_and_the_sum_last() {
        let wanted = "\
ok      key           4096 bytes
WRONG   daemon        no daemon\\nanswers
                        it does not run: start it
                          # systemctl start fence-daemon
unknown firewall      no nft
                        install it

on this hypervisor: 1 thing is wrong, 1 is unknown, 1 is well
";
        assert_eq!(render(&diagnosis(), Screen::PLAIN), wanted);
    }

    #[test]
    fn colours_and_width_are_the_terminals_and_commands_stay_whole() {
        let mut diagnosis = diagnosis();
        diagnosis.findings[1].remedy = Some("word ".repeat(40));
        diagnosis.findings[1].commands = vec!["x".repeat(200)];
        let page = render(&diagnosis, Screen { colours: true, width: Some(80), unicode: true });
        assert!(page.contains("\x1b[1;31mWRONG\x1b[0m") && page.contains(&"x".repeat(200)), "{page}");
        assert!(page.lines().filter(|line| line.contains("word")).all(|line| line.len() <= 80), "{page}");
    }

    #[test]
    fn warnings_are_nothing_wrong() {
        let all = Diagnosis::new(Side::Guest, vec![Finding::warning("key", "a", "b"), Finding::ok("key", "c")]);
        assert_eq!(summary(&all), "nothing is wrong in this guest: 1 warning, 1 is well");
        assert_eq!(all.verdict, State::Warning);
    }
}
