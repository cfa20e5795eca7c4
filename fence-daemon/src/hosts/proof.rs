//! Whether the hosts' own Pacemaker has fenced a host: the only proof that a silent host is dead.
//!
//! `stonith_admin --history` prints what Pacemaker's fencer on this host remembers, which all
//! fencers of the cluster share. An entry counts only if it succeeded, names exactly this host, and
//! ended clearly after the host was last heard.
//!
//! The entry's time is a wall clock's, of whichever host noted it, in whole seconds or finer.
//! When the host was last heard is known by this host's monotonic clock. So [`LastHeard`] has both
//! clocks of that moment, and the later of two reckonings counts: the wall clock then, and the wall
//! clock now minus the time since. [`MARGIN`] covers the resolution and the clocks of hosts that
//! keep time by NTP. An entry of the future shows clocks that differ, and is no proof. Neither is
//! one that was followed by "on", as the host may be up again.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::clock::Moment;

/// Pacemaker's tool.
const TOOL: &str = "stonith_admin";
/// How much later than the last word of a host its fencing must have ended.
pub const MARGIN: Duration = Duration::from_secs(2);
/// How long the history may be.
const LONGEST: u64 = 4 << 20;
/// How long its pipes may stay open after its end.
const CLOSING: Duration = Duration::from_millis(500);

/// When a host was last heard, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct LastHeard {
    /// The monotonic clock then.
    pub at: Moment,
    /// The wall clock then.
    pub wall: SystemTime,
}

impl LastHeard {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self { at: Moment::now(), wall: SystemTime::now() }
    }

    /// The wall clock of that moment, as late as it may have been.
    fn latest(&self, now: Moment, wall: SystemTime) -> SystemTime {
        let reckoned = wall.checked_sub(now.since(self.at)).unwrap_or(UNIX_EPOCH);
        self.wall.max(reckoned)
    }
}

/// How a host was fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It was switched off.
    Off,
    /// It was off, and was started again at once.
    Reboot,
}

/// A host's fencing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFencing {
    /// How.
    pub how: How,
    /// When it ended, by the wall clock of the host that noted it.
    pub at: SystemTime,
    /// How long ago that was at least, by this host's wall clock.
    pub ago: Duration,
}

/// Why there is no word about a host's fencing.
#[derive(Debug, thiserror::Error)]
pub enum NoHistory {
    /// Pacemaker is not installed.
    #[error("{TOOL} cannot be started: {0} (install pacemaker-cli-utils where the hosts are a Pacemaker cluster)")]
    NoTool(std::io::Error),
    /// It took too long, and was ended.
    #[error("{TOOL} --history did not end in time")]
    Late,
    /// Pacemaker does not run here, or refuses.
    #[error("{TOOL} --history failed: {0}")]
    Failed(String),
    /// What it printed is not understood.
    #[error("the output of {TOOL} --history is not understood: {0}")]
    Unknown(String),
}

/// The newest fencing of the host that Pacemaker calls `name`, if it proves that the host is dead
/// since it was last heard. Ends until `by`. It blocks.
///
/// # Errors
/// Pacemaker cannot be asked: nothing is proven.
pub fn fenced_since(name: &str, heard: LastHeard, by: Moment) -> Result<Option<HostFencing>, NoHistory> {
    let history = history(TOOL, by)?;
    proven(&history, name, heard, Moment::now(), SystemTime::now())
}

/// Runs the tool to its end, at most until `by`.
fn history(tool: &str, by: Moment) -> Result<String, NoHistory> {
    let mut command = Command::new(tool);
    // Without `--verbose` it prints one entry of all, and not the newest.
    command.args(["--history", "*", "--verbose", "--output-as=xml"]).env("LC_ALL", "C");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(NoHistory::NoTool)?;
    let readers = [child.stdout.take().map(read), child.stderr.take().map(read)];
    let ended = wait(&mut child, by);
    if !matches!(ended, Ok(Some(_))) {
        // It is our child and not reaped, so the number is still its own.
        let _ = child.kill();
        let _ = child.wait();
    }
    // A descendant that keeps a pipe open is not waited for.
    let text = |reader: Option<Receiver<String>>| reader.and_then(|text| text.recv_timeout(CLOSING).ok());
    let [printed, complaint] = readers.map(|reader| text(reader).unwrap_or_default());
    match ended {
        Ok(Some(status)) if status.success() => Ok(printed),
        Ok(Some(status)) => {
            let said = complaint.lines().chain(printed.lines()).map(str::trim).find(|line| !line.is_empty());
            Err(NoHistory::Failed(said.map_or_else(|| status.to_string(), |said| said.escape_debug().to_string())))
        }
        Ok(None) => Err(NoHistory::Late),
        Err(error) => Err(NoHistory::Failed(error.to_string())),
    }
}

/// Reads a pipe to its end on a thread of its own, so that neither pipe fills.
fn read(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, text) = sync_channel(1);
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.take(LONGEST).read_to_end(&mut bytes);
        // Fails only if nobody waits any more.
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    text
}

fn wait(child: &mut Child, by: Moment) -> std::io::Result<Option<std::process::ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Moment::now() >= by {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// An entry of the history about a host.
struct HistoryEntry {
    action: String,
    at: SystemTime,
}

/// Judges a history: see the module's text.
fn proven(
    xml: &str,
    name: &str,
    heard: LastHeard,
    now: Moment,
    wall: SystemTime,
) -> Result<Option<HostFencing>, NoHistory> {
    let unknown = |error: roxmltree::Error| NoHistory::Unknown(error.to_string());
    let document = roxmltree::Document::parse(xml).map_err(unknown)?;
    let events = document.descendants().filter(|node| node.has_tag_name("fence_event"));
    let events = events.filter(|event| {
        event.attribute("target") == Some(name)
            && event.attribute("status").or(event.attribute("state")) == Some("success")
    });
    let mut newest: Option<HistoryEntry> = None;
    for event in events {
        let (Some(action), Some(completed)) = (event.attribute("action"), event.attribute("completed")) else {
            return Err(NoHistory::Unknown("an entry without action or time".to_owned()));
        };
        let at = wall_clock(completed)
            .ok_or_else(|| NoHistory::Unknown(format!("the time `{}`", completed.escape_debug())))?;
        // Of two at the same time, the one that says less.
        let is_newer =
            newest.as_ref().is_none_or(|newest| at > newest.at || (at == newest.at && how(action).is_none()));
        if is_newer {
            newest = Some(HistoryEntry { action: action.to_owned(), at });
        }
    }
    let Some(HistoryEntry { action, at }) = newest else { return Ok(None) };
    let Some(how) = how(&action) else { return Ok(None) };
    let must_be_after = heard.latest(now, wall) + MARGIN;
    let Ok(ago) = wall.duration_since(at) else { return Ok(None) };
    Ok((at > must_be_after).then_some(HostFencing { how, at, ago }))
}

/// What an action means for a host: anything but `off` and `reboot` proves nothing.
fn how(action: &str) -> Option<How> {
    match action {
        "off" => Some(How::Off),
        "reboot" => Some(How::Reboot),
        _ => None,
    }
}

/// Pacemaker's time: `2026-11-30 03:12:45.123456 +01:00`, without the fraction before 2.1, and with
/// `Z` for UTC, with or without the space.
fn wall_clock(text: &str) -> Option<SystemTime> {
    let (date, rest) = text.trim().split_once(' ')?;
    let zone_at = rest.find(['Z', '+', '-'])?;
    let (time, zone) = rest.split_at(zone_at);
    let (time, fraction) = time.trim().split_once('.').unwrap_or((time.trim(), ""));
    let numbers = |text: &str, separator: char, count: usize| -> Option<Vec<u64>> {
        let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let parts: Vec<&str> = text.split(separator).collect();
        if parts.len() != count || !parts.iter().all(is_number) {
            return None;
        }
        parts.into_iter().map(|part| part.parse().ok()).collect()
    };
    let (date, time) = (numbers(date, '-', 3)?, numbers(time, ':', 3)?);
    let (year, month, day) = (*date.first()?, *date.get(1)?, *date.get(2)?);
    let (hour, minute, second) = (*time.first()?, *time.get(1)?, *time.get(2)?);
    if !(1970..10_000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if hour > 24 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = ((days(year, month, day)? * 24 + hour) * 60 + minute) * 60 + second;
    // A longer fraction is cut.
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u64 = digits.parse().ok()?;
    let at = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_nanos(nanos);
    match zone.split_at_checked(1)? {
        ("Z", "") => Some(at),
        (sign, offset) => {
            let offset = numbers(offset, ':', 2)?;
            let offset = Duration::from_secs((offset.first()? * 60 + offset.get(1)?) * 60);
            if sign == "+" { at.checked_sub(offset) } else { at.checked_add(offset) }
        }
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    // Years begin in March, so that the leap day is their last one.
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let in_year = (153 * month + 2) / 5 + day - 1;
    (year * 365 + year / 4 - year / 100 + year / 400 + in_year).checked_sub(719_468)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// 2026-11-30 03:12:45 UTC.
    const AT: u64 = 1_796_008_365;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_read_in_every_form() {
        for text in [
            "2026-11-30 03:12:45Z",
            "2026-11-30 03:12:45 Z",
            "2026-11-30 03:12:45 +00:00",
            "2026-11-30 04:12:45 +01:00",
            "2026-11-29 21:42:45 -05:30",
            "2026-11-30 03:12:45.000000Z",
        ] {
            assert_eq!(wall_clock(text), Some(at(AT)), "{text}");
        }
        let fraction = wall_clock("2026-11-30 03:12:45.250000 +00:00");
        assert_eq!(fraction, Some(at(AT) + Duration::from_millis(250)));
        assert_eq!(wall_clock("1970-01-01 00:00:00Z"), Some(UNIX_EPOCH));
        assert_eq!(wall_clock("2024-02-29 00:00:00Z"), Some(at(1_709_164_800)));
        for text in ["", "yesterday", "2026-11-30", "2026-11-30 03:12:45", "2026-13-30 03:12:45Z", "2026-11-30 03:12Z"]
        {
            assert_eq!(wall_clock(text), None, "{text}");
        }
    }

    fn history_of(entries: &[(&str, &str, &str, u64)]) -> String {
        let entry = |(target, action, status, seconds): &(&str, &str, &str, u64)| {
            let clock = format!("03:{:02}:{:02}", seconds / 60, seconds % 60);
            format!(
                r#"<fence_event action="{action}" target="{target}" client="c" origin="o" status="{status}" completed="2026-11-30 {clock}Z"/>"#
            )
        };
        let entries: String = entries.iter().map(entry).collect();
        format!(
            r#"<pacemaker-result api-version="2.25"><fence_history>{entries}</fence_history><status code="0"/></pacemaker-result>"#
        )
    }

    /// Judges a history at 03:20:00 about `alpha`, last heard at 03:10:00 by the wall clock.
    fn judge(entries: &[(&str, &str, &str, u64)]) -> Option<HostFencing> {
        let hour = AT - 12 * 60 - 45;
        let now = Moment::from_ktime(10_000_000_000_000);
        let heard = LastHeard { at: now.before(Duration::from_secs(600)), wall: at(hour + 600) };
        proven(&history_of(entries), "alpha", heard, now, at(hour + 1200)).expect("a history")
    }

    #[test]
    fn only_a_success_about_this_host_after_its_last_word_counts() {
        let fenced = judge(&[("alpha", "off", "success", 700)]).expect("fenced");
        assert_eq!((fenced.how, fenced.ago), (How::Off, Duration::from_secs(500)));
        assert_eq!(judge(&[("alpha", "reboot", "success", 700)]).map(|fenced| fenced.how), Some(How::Reboot));
        for (entries, why) in [
            (vec![], "nothing"),
            (vec![("beta", "off", "success", 700)], "another host"),
            (vec![("alpha2", "off", "success", 700)], "another name"),
            (vec![("alpha", "off", "failed", 700)], "a failure"),
            (vec![("alpha", "off", "pending", 700)], "not over"),
            (vec![("alpha", "off", "success", 500)], "before its last word"),
            (vec![("alpha", "off", "success", 602)], "within the margin"),
            (vec![("alpha", "off", "success", 1201)], "in the future"),
            (vec![("alpha", "off", "success", 700), ("alpha", "on", "success", 710)], "up again"),
            (vec![("alpha", "on", "success", 700), ("alpha", "off", "success", 700)], "in doubt"),
            (vec![("alpha", "off", "success", 700), ("alpha", "on", "success", 700)], "in doubt"),
            (vec![("alpha", "metadata", "success", 700)], "no fencing"),
        ] {
            assert_eq!(judge(&entries), None, "{why}");
        }
        assert!(judge(&[("alpha", "on", "success", 700), ("alpha", "off", "success", 710)]).is_some());
        assert!(judge(&[("alpha", "off", "success", 700), ("alpha", "off", "failed", 710)]).is_some());
    }

    #[test]
    fn the_later_reckoning_of_two_clocks_counts() {
        let now = Moment::from_ktime(10_000_000_000_000);
        let ten_minutes_ago = now.before(Duration::from_secs(600));
        // The wall clock was set back, or forward, since the host was last heard.
        for wall in [at(AT), at(AT - 3600)] {
            assert_eq!(LastHeard { at: ten_minutes_ago, wall: at(AT) }.latest(now, wall), at(AT));
        }
        let set_forward = LastHeard { at: ten_minutes_ago, wall: at(AT) }.latest(now, at(AT + 3600));
        assert_eq!(set_forward, at(AT + 3000));
    }

    #[test]
    fn a_history_that_is_not_understood_proves_nothing() {
        let now = Moment::now();
        let heard = LastHeard { at: now, wall: UNIX_EPOCH };
        for xml in [
            "no XML",
            r#"<r><fence_event target="alpha" status="success" action="off"/></r>"#,
            r#"<r><fence_event target="alpha" status="success" action="off" completed="now"/></r>"#,
        ] {
            assert!(matches!(proven(xml, "alpha", heard, now, SystemTime::now()), Err(NoHistory::Unknown(_))), "{xml}");
        }
    }

    #[test]
    fn the_tool_is_waited_for_and_no_longer() {
        let folder = tempfile::tempdir().expect("a directory");
        let tool = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a script");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
            path.to_string_lossy().into_owned()
        };
        let soon = || Moment::now().plus(Duration::from_secs(30));
        let fine = tool("fine", "[ \"$1 $2 $3 $4\" = '--history * --verbose --output-as=xml' ] && echo '<x/>'");
        assert_eq!(history(&fine, soon()).expect("an output"), "<x/>\n");
        let refused = history(&tool("refused", "echo not connected >&2; exit 102"), soon());
        assert!(matches!(&refused, Err(NoHistory::Failed(said)) if said == "not connected"), "{refused:?}");
        let hung = history(&tool("hung", "exec sleep 1000"), Moment::now());
        assert!(matches!(hung, Err(NoHistory::Late)), "{hung:?}");
        let none = history("/nowhere/stonith_admin", soon());
        assert!(matches!(none, Err(NoHistory::NoTool(_))), "{none:?}");
    }
}
