//! The socket's file and its clients, on this machine and without a kernel program.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fence_common::admit::Rules;
use fence_common::hash::HashKind;
use fence_config::{self as config, Multicast, Options, Source, Warnings};
use fence_control::client::{self, ClientError};
use fence_control::path;
use fence_control::report::{Health, Report};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use tempfile::tempdir;

use super::inspector::{Inspector, Phase};
use super::server::{CLIENTS_MAX, Control, ControlError};
use crate::control::multicast::Watched;
use crate::hypervisor::Hypervisors;
use crate::intake::judge::Judge;
use crate::intake::socket::RequestSocket;
use crate::observe::sources::SourceView;
use crate::state::socket::ControlSocketError;

/// How long a certain event may take on a loaded machine.
const SURELY: Duration = Duration::from_secs(60);

const SCHEMA_TEXT: &str = include_str!("../../../docs/reference/status.schema.json");

fn check_form(report: &serde_json::Value) {
    let schema = jsonschema::validator_for(&serde_json::from_str(SCHEMA_TEXT).unwrap()).unwrap();
    let wrong: Vec<_> = schema.iter_errors(report).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

fn multicast() -> Multicast {
    let text = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; } listeners { multicast { address = \"239.255.77.13\"; hash = \"none\"; auth = \"none\"; } }";
    let parsed = config::parse(&Source::new(Path::new("test"), text.as_bytes()), Warnings::default());
    parsed.unwrap_or_else(|error| panic!("{}", error.render(false))).0.multicast().unwrap().clone()
}

/// An inspector of a daemon that hears nothing, at a port of its own.
fn inspector(port: u16) -> (Arc<Inspector>, Arc<RequestSocket>) {
    let multicast = Multicast { port, ..multicast() };
    let rules = Rules { min_hash: HashKind::None, strict_source: true };
    let socket = Arc::new(RequestSocket::open(multicast.group, port, rules, None).unwrap());
    let hypervisors = Hypervisors::start(&["test:///default".to_owned()], Options::default());
    let watched = vec![Watched::new(multicast, &socket, false)];
    (Arc::new(Inspector::new(watched, Judge::new(None.into()), hypervisors)), socket)
}

async fn ask(path: &Path) -> Result<Report, ClientError> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || client::ask(&path).and_then(|answer| client::parse(&answer))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_report_has_the_documented_form() {
    let (inspector, _socket) = inspector(11_240);
    inspector.listeners().multicasts[0].set_sources(Box::new(|| {
        let seen = Some(crate::clock::Moment::now());
        let address = "192.168.122.11".parse().unwrap();
        let mac = Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        vec![SourceView { address, mac, trusted: true, failures: 1, delivered: 2, limited: 3, last_seen: seen }]
    }));
    let report = inspector.report();
    check_form(&serde_json::to_value(&report).unwrap());
    assert_eq!((report.health, report.listeners[0].port), (Health::Starting, 11_240));
    assert_eq!(report.sources[0].mac.as_deref(), Some("52:54:00:12:34:56"));
    assert!(report.problems.iter().any(|problem| problem.contains("no request is heard")), "{:?}", report.problems);
    inspector.enter(Phase::Serving);
    assert_eq!(inspector.report().health, Health::Degraded);
    inspector.enter(Phase::Stopping);
    assert_eq!(inspector.report().health, Health::Stopping);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_is_roots_alone_and_goes_with_the_daemon() {
    use std::os::unix::fs::PermissionsExt as _;
    let scratch = tempdir().unwrap();
    let (inspector, _socket) = inspector(11_241);
    let directory = scratch.path().join("state");
    let control = Control::open(&directory, Arc::clone(&inspector)).unwrap();
    let file = path(&directory);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(ask(&file).await.unwrap().daemon.pid, std::process::id());

    // A second daemon is rejected, and takes nothing from the first.
    let refused = Control::open(&directory, Arc::clone(&inspector)).unwrap_err();
    assert!(matches!(refused, ControlError::File(ControlSocketError::Living(_))), "{refused}");
    ask(&file).await.unwrap();

    drop(control);
    assert!(!file.exists());
    assert!(ask(&file).await.unwrap_err().is_nobody());

    // What a dead one has left is replaced.
    drop(StdListener::bind(&file).unwrap());
    assert!(ask(&file).await.unwrap_err().is_nobody());
    let control = Control::open(&directory, Arc::clone(&inspector)).unwrap();
    ask(&file).await.unwrap();
    // A file that somebody else has put in its place stays.
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, "somebody's").unwrap();
    drop(control);
    assert_eq!(std::fs::read(&file).unwrap(), b"somebody's");
    let refused = Control::open(&directory, inspector).unwrap_err();
    assert!(matches!(refused, ControlError::File(ControlSocketError::NotASocket(_))), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_path_is_an_error_with_a_remedy() {
    let scratch = tempdir().unwrap();
    let (inspector, _socket) = inspector(11_242);
    let long = scratch.path().join("x".repeat(100));
    let refused = Control::open(&long, Arc::clone(&inspector)).unwrap_err();
    assert!(
        matches!(refused, ControlError::TooLong(_)) && refused.to_string().contains("state_directory"),
        "{refused}"
    );
    assert!(!long.exists());
    assert!(matches!(ask(&path(&long)).await.unwrap_err(), ClientError::TooLong(_)));
    let refused = Control::open(Path::new("/proc/nowhere"), inspector).unwrap_err();
    assert!(
        matches!(refused, ControlError::File(ControlSocketError::State(_)))
            && refused.to_string().contains("state_directory"),
        "{refused}"
    );
}

/// Asks until there is an answer, for much longer than a client may hang.
async fn told_at_last(file: &Path) {
    let begun = Instant::now();
    while let Err(error) = ask(file).await {
        assert!(matches!(&error, ClientError::Refused(why) if why.contains("too many clients")), "{error}");
        assert!(begun.elapsed() < SURELY, "they are never let go of");
    }
}

/// What such a client gets, to the end.
fn rest(mut stream: StdStream) -> String {
    stream.set_read_timeout(Some(SURELY)).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_clients_are_limited_and_cut_off() {
    let scratch = tempdir().unwrap();
    let (inspector, _socket) = inspector(11_243);
    let _control = Control::open(scratch.path(), inspector).unwrap();
    let file = path(scratch.path());
    let idle: Vec<_> = (0..100).map(|_| StdStream::connect(&file).unwrap()).collect();
    told_at_last(&file).await;
    let told: Vec<_> = idle.into_iter().map(rest).collect();
    let (silent, refused): (Vec<_>, Vec<_>) = told.iter().partition(|told| told.is_empty());
    assert!(silent.len() >= CLIENTS_MAX && refused.len() >= CLIENTS_MAX, "{} have hung", silent.len());
    assert!(
        refused.iter().all(|told| told.contains("too many clients") && told.contains("\"again\":true")),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_are_cut_off() {
    let scratch = tempdir().unwrap();
    let (inspector, _socket) = inspector(11_244);
    // More than the kernel buffers for a client that does not read.
    let source = SourceView {
        address: "192.168.122.11".parse().unwrap(),
        mac: None,
        trusted: false,
        failures: 1,
        delivered: 2,
        limited: 3,
        last_seen: None,
    };
    inspector.listeners().multicasts[0].set_sources(Box::new(move || vec![source.clone(); 20_000]));
    let _control = Control::open(scratch.path(), inspector).unwrap();
    let file = path(scratch.path());
    let deaf = |_| {
        let mut stream = StdStream::connect(&file).unwrap();
        stream.write_all(b"status\n").unwrap();
        stream
    };
    let deaf: Vec<_> = (0..CLIENTS_MAX).map(deaf).collect();
    told_at_last(&file).await;
    for stream in deaf {
        // The client starts to read only now: the daemon waits for a client that reads.
        let limit = Timespec { tv_sec: SURELY.as_secs().try_into().unwrap(), tv_nsec: 0 };
        let mut watched = [PollFd::new(&stream, PollFlags::empty())];
        poll(&mut watched, Some(&limit)).unwrap();
        assert!(watched[0].revents().contains(PollFlags::HUP), "it is waited for");
        let told = rest(stream);
        assert!(told.len() > 1000 && !told.ends_with('\n'), "it was waited for: {} bytes", told.len());
    }
}
