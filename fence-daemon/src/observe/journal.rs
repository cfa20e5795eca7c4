//! Log messages for systemd's journal, by its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
//!
//! `journalctl` shows only the field `MESSAGE`. So `MESSAGE` is the whole line, as on standard
//! error: the text, and then each field as `name=value`. For machines each field also stands by
//! itself, as `FENCE_NAME`.

use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FormatFields as _;
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::layer::{Context, Layer};

use super::logging::IDENTITY;
use super::relay::{Relay, Sink};

/// Where the journal takes messages.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";

/// Syslog's number for messages of system daemons.
const FACILITY_DAEMON: &str = "3";

/// The prefix of the daemon's own fields in the journal.
const PREFIX: &str = "FENCE_";

/// The longest value of a field, in bytes. Longer ones are cut, so that a message fits into one
/// datagram.
const LONGEST: usize = 16 * 1024;

/// Sends each event to the journal, through a relay: the journal takes a few messages at once, and
/// may be slow or hang.
pub(super) struct Journal(Relay);

/// What sends datagrams to the journal.
///
/// # Errors
/// There is no journal, or it does not answer.
pub(super) fn sink() -> io::Result<Sink> {
    let socket = UnixDatagram::unbound()?;
    // Nobody waits here for a journal that hangs.
    socket.set_nonblocking(true)?;
    // The journal ignores an empty message. Without a journal the send fails.
    socket.send_to(&[], SOCKET)?;
    socket.set_nonblocking(false)?;
    Ok(Box::new(move |_, datagram| socket.send_to(datagram, SOCKET).is_ok()))
}

/// A warning without fields.
pub(super) fn warning(text: &str) -> Vec<u8> {
    begin(Level::WARN, text)
}

fn begin(level: Level, message: &str) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(1024);
    put(&mut datagram, "PRIORITY", priority(level));
    put(&mut datagram, "SYSLOG_FACILITY", FACILITY_DAEMON);
    put(&mut datagram, "SYSLOG_IDENTIFIER", IDENTITY);
    put(&mut datagram, "MESSAGE", message);
    datagram
}

impl Journal {
    pub(super) fn new(relay: Relay) -> Self {
        Self(relay)
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut message = String::with_capacity(512);
        // Fails only if a value cannot be formatted; the text so far is logged.
        let _ = DefaultFields::new().format_fields(Writer::new(&mut message), event);
        let about = event.metadata();
        let mut datagram = begin(*about.level(), &message);
        put(&mut datagram, "TARGET", about.target());
        if let (Some(file), Some(line)) = (about.file(), about.line()) {
            put(&mut datagram, "CODE_FILE", file);
            put(&mut datagram, "CODE_LINE", &line.to_string());
        }
        let mut fields = Fields { datagram: &mut datagram, op: None, reply: None };
        event.record(&mut fields);
        let (op, reply) = (fields.op, fields.reply);
        if let Some(id) = super::message_ids::of(about.target(), op.as_deref(), reply.as_deref()) {
            put(&mut datagram, "MESSAGE_ID", id);
        }
        self.0.send(*about.level(), datagram);
    }
}

/// As syslog numbers them.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// Writes a field in the form that may hold any byte: name, end of line, length, value, end of
/// line.
fn put(datagram: &mut Vec<u8>, name: &str, value: &str) {
    let value = value.get(..value.floor_char_boundary(LONGEST)).unwrap_or_default();
    datagram.extend_from_slice(name.as_bytes());
    datagram.push(b'\n');
    datagram.extend_from_slice(&u64::try_from(value.len()).unwrap_or_default().to_le_bytes());
    datagram.extend_from_slice(value.as_bytes());
    datagram.push(b'\n');
}

/// Writes an event's own fields, and notes those that tell its kind.
struct Fields<'d> {
    datagram: &'d mut Vec<u8>,
    op: Option<String>,
    reply: Option<String>,
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        // The message is in `MESSAGE`.
        if field.name() != "message" {
            put(self.datagram, &name(field.name()), value);
        }
        match field.name() {
            "op" => self.op = Some(value.to_owned()),
            "reply" => self.reply = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.record_str(field, &text);
    }
}

/// A field's name in the journal, where names have capital letters, digits and underscores.
fn name(field: &str) -> String {
    let letters = field.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    PREFIX.chars().chain(letters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_any_length_and_with_ends_of_lines_keep_the_form() {
        let mut datagram = Vec::new();
        put(&mut datagram, "MESSAGE", "a\nb");
        assert_eq!(datagram, b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n");
        datagram.clear();
        put(&mut datagram, "MESSAGE", &"\u{e4}".repeat(LONGEST));
        assert_eq!(datagram.len(), "MESSAGE\n".len() + 8 + LONGEST + 1);
        datagram.clear();
        put(&mut datagram, "MESSAGE", &format!("a{}", "\u{e4}".repeat(LONGEST)));
        assert_eq!(datagram.len(), "MESSAGE\n".len() + 8 + LONGEST - 1 + 1);
    }

    #[test]
    fn field_names_have_the_journals_form() {
        assert_eq!(name("called_back"), "FENCE_CALLED_BACK");
        assert_eq!(name("log.target"), "FENCE_LOG_TARGET");
    }
}
