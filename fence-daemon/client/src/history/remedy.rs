//! Which ends are failures, and what to type then.

use std::path::Path;

use fence_control::history::{Asked, Event};

/// Whether something went wrong for a client. A copy of a request, and one that a newer request has
/// replaced, are no failures.
pub(super) fn is_failure(event: &Event) -> bool {
    match event {
        Event::Request(asked) => of_result(asked).is_some(),
        Event::Unfinished(_) | Event::Unsigned(_) => true,
        Event::Started { .. } | Event::Lost { .. } => false,
    }
}

/// Why it failed, and the commands to type; `None` if it did not fail.
pub(super) fn of(event: &Event, key_file: &Path) -> Option<(String, Vec<String>)> {
    match event {
        Event::Request(asked) => {
            let (why, commands) = of_result(asked)?;
            let why = if asked.detail.is_empty() { why.to_owned() } else { format!("{why}: {}", asked.detail) };
            Some((why, commands))
        }
        Event::Unfinished(begun) => Some((
            "the daemon ended while it served this, so the domain may be off or not".to_owned(),
            vec![
                format!("virsh domstate {}    (is it off?)", quoted(&begun.domain)),
                "journalctl -u fence-daemon -p err    (why did the daemon end?)".to_owned(),
            ],
        )),
        Event::Unsigned(sender) => {
            let (key, address) = (key_file.display(), &sender.address);
            let mac = sender.mac.as_ref().map(|mac| format!(" ({mac})")).unwrap_or_default();
            Some((
                format!(
                    "{} requests of {address}{mac} had no signature: its key file is missing, or it asks with `-c none`",
                    sender.count
                ),
                vec![
                    format!("scp {key} root@{address}:/etc/cluster/fence_xvm.key    (from this host)"),
                    "fence-daemon doctor --from-guest    (in that guest)".to_owned(),
                ],
            ))
        }
        Event::Started { .. } | Event::Lost { .. } => None,
    }
}

fn of_result(asked: &Asked) -> Option<(&'static str, Vec<String>)> {
    let type_this = |commands: &[&str]| commands.iter().map(|command| (*command).to_owned()).collect();
    let doctor = "fence-daemon doctor    (on this host)";
    Some(match asked.result.as_str() {
        "success" | "off" | "none" | "superseded" | "duplicate" => return None,
        "failure" => {
            let mut commands = vec![doctor.to_owned()];
            if let Some(domain) = &asked.domain {
                commands.insert(0, format!("virsh domstate {}    (is it known here, by this name?)", quoted(domain)));
            }
            ("the client was told that it failed", commands)
        }
        "permission denied" => (
            "its group does not permit it",
            type_this(&[
                "fence-daemon check-config    (shows the groups)",
                "fence-daemon status    (shows the client)",
            ]),
        ),
        "no callback" => (
            "the client could not be called back",
            type_this(&["fence-daemon doctor --from-guest    (in the guest)", doctor]),
        ),
        "undelivered" => (
            "it was done, but the client was gone before the answer",
            type_this(&["fence-daemon doctor --from-guest    (in the guest)"]),
        ),
        "rejected" | "displaced" => (
            "it was not begun",
            type_this(&["fence-daemon top    (who asks so often?)", "uptime    (is the host overloaded?)"]),
        ),
        "retired key" => (
            "its key was dropped before the daemon read it",
            type_this(&["fence-daemon doctor --from-guest    (in the guest: does it have the new key?)"]),
        ),
        "stopped" => {
            ("the daemon was stopped", type_this(&["systemctl status fence-daemon", "journalctl -u fence-daemon"]))
        }
        _ => ("it did not succeed", type_this(&[doctor])),
    })
}

/// A domain's name for a shell.
fn quoted(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if !name.is_empty() && name.chars().all(is_plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use fence_common::ending::Ending;

    use super::super::tests::asked;
    use super::*;

    #[test]
    fn each_way_to_fail_has_a_reason_and_a_command() {
        for ending in Ending::ALL {
            let event = Event::Request(asked(ending.name(), "this is why"));
            let expected = match ending {
                Ending::Success | Ending::Off | Ending::Unsent | Ending::Superseded | Ending::Duplicate => false,
                Ending::Failure
                | Ending::PermissionDenied
                | Ending::NoCallback
                | Ending::Undelivered
                | Ending::Rejected
                | Ending::Displaced
                | Ending::RetiredKey
                | Ending::Stopped => true,
            };
            assert_eq!(is_failure(&event), expected, "{ending:?}");
            let remedy = of(&event, Path::new("/k"));
            assert_eq!(remedy.is_some(), expected, "{ending:?}");
            if let Some((why, commands)) = remedy {
                assert!(why.contains("this is why") && !why.contains("did not succeed"), "{ending:?}: {why}");
                assert!(!commands.is_empty(), "{ending:?}");
            }
        }
    }

    #[test]
    fn a_name_cannot_become_a_command() {
        assert_eq!(
            (quoted("node-1"), quoted("a b"), quoted("x'; rm")),
            ("node-1".into(), "'a b'".into(), "'x'\\''; rm'".into())
        );
    }
}
