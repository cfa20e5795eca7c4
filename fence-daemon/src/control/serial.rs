//! A serial listener in the report.

use fence_common::hash::HashKind;
use fence_common::words::counted;
use fence_control::report::Listener;

use super::inspector::by_name;
use crate::intake::serial::{LineIntake, LineView};

pub(super) fn view(intake: &LineIntake) -> Listener {
    let (settings, lines) = (intake.settings(), intake.lines());
    Listener {
        kind: "serial".to_owned(),
        name: settings.name.clone(),
        address: settings.path.display().to_string(),
        port: 0,
        interface: None,
        hash: HashKind::None.name().to_owned(),
        auth: HashKind::None.name().to_owned(),
        attach: None,
        alone: None,
        hears: lines.iter().all(|line| line.trouble.is_none()),
        status: status(&lines),
        interfaces: Vec::new(),
        counters: by_name(intake.counters()),
    }
}

/// How many lines there are, and what is odd about them.
fn status(lines: &[LineView]) -> String {
    let mut text = counted(lines.len(), "line");
    for line in lines {
        let name = line.domain.escape_debug();
        if let Some(trouble) = &line.trouble {
            text.push_str(&format!("; {name}, {}: {trouble}", line.path));
        }
        if line.stray > 0 {
            text.push_str(&format!("; {name} has sent {} that belong to no request", counted(line.stray, "byte")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_names_each_line_that_is_odd() {
        let line = |domain: &str, trouble: Option<&str>, stray| LineView {
            domain: domain.to_owned(),
            path: format!("/run/fence/{domain}"),
            trouble: trouble.map(str::to_owned),
            stray,
        };
        assert_eq!(status(&[]), "0 lines");
        assert_eq!(status(&[line("a", None, 0)]), "1 line");
        let odd = [line("a", Some("Connection refused"), 0), line("b\n", None, 7), line("c", None, 0)];
        assert_eq!(
            status(&odd),
            "3 lines; a, /run/fence/a: Connection refused; b\\n has sent 7 bytes that belong to no request"
        );
    }
}
