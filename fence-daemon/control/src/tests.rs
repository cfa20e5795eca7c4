//! Tests that the documentation shows the report's form, and how the client reads any answer.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;

use tempfile::tempdir;

use super::client::{self, ClientError};
use super::report::Report;

const EXAMPLE: &str = include_str!("../../../docs/reference/status.example.json");
const SCHEMA_TEXT: &str = include_str!("../../../docs/reference/status.schema.json");

/// The documented example.
fn example() -> Report {
    client::parse(EXAMPLE).unwrap()
}

fn check_form(report: &serde_json::Value) {
    let schema = jsonschema::validator_for(&serde_json::from_str(SCHEMA_TEXT).unwrap()).unwrap();
    let wrong: Vec<_> = schema.iter_errors(report).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn the_example_is_as_documented_and_complete() {
    let value: serde_json::Value = serde_json::from_str(EXAMPLE).unwrap();
    check_form(&value);
    // A round trip changes nothing: the type has each documented field, and no other.
    assert_eq!(serde_json::to_value(example()).unwrap(), value);
    for (pointer, wrong) in [
        ("/health", serde_json::json!("fine")),
        ("/daemon/pid", serde_json::json!(-1)),
        ("/requests/recent/0/steps", serde_json::json!({})),
        ("/uris/0/domains/0/uuid", serde_json::json!(7)),
    ] {
        let mut value = value.clone();
        *value.pointer_mut(pointer).unwrap() = wrong;
        let schema = jsonschema::validator_for(&serde_json::from_str(SCHEMA_TEXT).unwrap()).unwrap();
        assert!(!schema.is_valid(&value), "{pointer}");
    }
}

#[test]
fn a_client_too_many_asks_again() {
    let scratch = tempdir().unwrap();
    let file = scratch.path().join("busy");
    let listener = StdListener::bind(&file).unwrap();
    let busy = std::thread::spawn(move || {
        let busy = "{\"schema\":3,\"error\":\"too many\",\"again\":true}\n";
        for said in [busy, busy, EXAMPLE] {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(said.as_bytes()).unwrap();
        }
    });
    let answer = client::ask(&file).unwrap();
    assert_eq!(client::parse(&answer).unwrap(), example());
    busy.join().unwrap();
}

/// A server at this path that is not the daemon. It sends `says`, and with `hangs` never closes.
fn pretender(path: &Path, says: &'static [u8], hangs: bool) -> std::thread::JoinHandle<()> {
    let listener = StdListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(says);
        if hangs {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    })
}

#[test]
fn each_unusable_answer_has_its_own_error() {
    let scratch = tempdir().unwrap();
    type Expected = fn(&ClientError) -> bool;
    let cases: [(&'static [u8], bool, Expected); 6] = [
        (b"{\"schema\":1}\n", false, |error| matches!(error, ClientError::Schema(1))),
        (
            b"{\"schema\":3,\"error\":\"no\"}\n",
            false,
            |error| matches!(error, ClientError::Refused(why) if why == "no"),
        ),
        (b"{\"schema\":3}\n", false, |error| matches!(error, ClientError::Strange(_))),
        (b"HTTP/1.1 400\n", false, |error| matches!(error, ClientError::Strange(_))),
        (b"", false, |error| matches!(error, ClientError::Broken { .. })),
        (b"", true, |error| matches!(error, ClientError::Silent(_))),
    ];
    for (number, (says, hangs, expected)) in cases.into_iter().enumerate() {
        let file = scratch.path().join(number.to_string());
        let pretender = pretender(&file, says, hangs);
        let error = client::ask(&file).and_then(|answer| client::parse(&answer)).unwrap_err();
        assert!(expected(&error), "{says:?}: {error:?}");
        pretender.join().unwrap();
    }
}

/// A newer daemon may send more fields.
#[test]
fn unknown_fields_do_no_harm() {
    let mut value: serde_json::Value = serde_json::from_str(EXAMPLE).unwrap();
    value["of_tomorrow"] = serde_json::json!({"x": 1});
    value["daemon"]["mood"] = serde_json::json!("good");
    assert_eq!(client::parse(&value.to_string()).unwrap(), example());
}
