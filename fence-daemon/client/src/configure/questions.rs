//! The questions, their explanations, and where each answer goes.

use fence_config::document::Document;
use fence_config::{self as config, Backend, Plugin};

use super::ConfigureError;
use super::dialogue::Dialogue;
use super::listeners::{Chosen, section};
use super::values::{GLOBAL, check, check_key_file, check_uri, writable};
use crate::cli::{self, Given};

const MODULES: &str = "\
fence_virtd loads its plugins from a directory. This daemon has its plugins built in and ignores the setting. It matters only
if fence_virtd uses this file again. `none`: fence_virtd's default.";
const LISTENER: &str = "\
The listener receives the guests' requests: multicast, tcp, vsock or serial, or several with commas between them.";
const BACKEND: &str = "\
The backend carries requests out. `libvirt`: this host answers by itself. `cpg`: the hypervisors of a corosync cluster answer
together, so each of them needs this daemon, the same key and the same backend.";
const URI: &str = "\
The libvirt connection that has the guests: qemu:///system for virtual machines of this host, lxc:/// for containers.";

/// fence_virtd's default if neither the file nor an option has a value.
pub(super) const NOTHING: &str = "none";

/// The questions about one file.
pub(super) struct Questions<'q, 'd> {
    pub(super) document: Document,
    pub(super) given: &'q Given,
    pub(super) dialogue: &'q mut Dialogue<'d>,
}

/// One of them.
pub(super) struct Question<'a> {
    pub(super) label: &'static str,
    pub(super) about: &'static str,
    pub(super) section: &'static [&'static str],
    pub(super) key: &'a str,
    /// The value if neither the file nor an answer has one.
    pub(super) fallback: &'a str,
    /// The option's name, and its value.
    pub(super) given: Option<(&'static str, &'a str)>,
}

impl<'q, 'd> Questions<'q, 'd> {
    pub(super) fn new(document: Document, given: &'q Given, dialogue: &'q mut Dialogue<'d>) -> Self {
        Self { document, given, dialogue }
    }

    /// Asks what is not given, and returns the new file.
    pub(super) fn ask(mut self) -> Result<Document, ConfigureError> {
        let given = self.given;
        // Invalid options are reported before any question.
        self.check_options()?;

        self.modules()?;
        if !given.yes {
            self.dialogue.say(&format!("\n{}", cli::list().trim_end()))?;
        }
        self.plugin(Plugin::Listener, "Listener module", LISTENER)?;
        let chosen = Chosen::of(self.document.get(GLOBAL, Plugin::Listener.key()).unwrap_or_default());
        for kind in chosen.all() {
            self.listener(kind, &chosen)?;
        }
        self.plugin(Plugin::Backend, "Backend module", BACKEND)?;
        self.uris()?;
        self.permission(&chosen)?;
        Ok(self.document)
    }

    /// Checks the options. Those of a listener concern the first one that is chosen.
    fn check_options(&self) -> Result<(), ConfigureError> {
        let given = self.given;
        let wrong = |option| move |why| ConfigureError::Option { option, why };
        if let Some(listener) = &given.listener {
            check(GLOBAL, &[("listener", listener)]).map_err(wrong("listener"))?;
        }
        let written = given.listener.as_deref().or_else(|| self.document.get(GLOBAL, Plugin::Listener.key()));
        let chosen = Chosen::of(written.unwrap_or(Plugin::Listener.usual()));
        let section_of = |option: &'static str| {
            let lacking = || wrong(option)("no chosen listener has such a key".to_owned());
            chosen.with_key(option).map(section).ok_or_else(lacking)
        };
        for (option, value) in given.of_listener() {
            if let Some(value) = value {
                check(section_of(option)?, &[(option, value)]).map_err(wrong(option))?;
            }
        }
        if let (Some(family), Some(address)) = (&given.family, &given.address) {
            check(section_of("address")?, &[("family", family), ("address", address)]).map_err(wrong("address"))?;
        }
        if let Some(path) = &given.key_file {
            section_of("key-file")?;
            let path = path.to_str().ok_or_else(|| wrong("key-file")("it is not UTF-8 text".to_owned()))?;
            check_key_file(path).map_err(wrong("key-file"))?;
        }
        given.uris.iter().try_for_each(|uri| check_uri(uri).map_err(wrong("uri")))
    }

    /// Settles one question by the command line or by asking. Nothing is set yet.
    pub(super) fn settle(
        &mut self,
        question: &Question<'_>,
        accept: impl Fn(&str) -> Result<(), String>,
    ) -> Result<String, ConfigureError> {
        if let Some((option, value)) = question.given {
            return match accept(value) {
                Ok(()) => Ok(value.to_owned()),
                Err(why) => Err(ConfigureError::Option { option, why }),
            };
        }
        let old = self.document.get(question.section, question.key);
        if self.given.yes {
            // The final check refuses an invalid old value, with its position: nobody can be asked
            // here.
            return Ok(old.unwrap_or(question.fallback).to_owned());
        }
        self.dialogue.say(&format!("\n{}", question.about))?;
        let mut default = question.fallback;
        if let Some(old) = old {
            match accept(old) {
                Ok(()) => default = old,
                Err(why) => self.dialogue.say(&format!("The file's present value is invalid: {why}."))?,
            }
        }
        Ok(self.dialogue.ask(question.label, default, |answer| accept(answer).map(|()| answer.to_owned()))?)
    }

    /// Asks a question whose answer goes into the file unchanged.
    pub(super) fn setting(&mut self, question: &Question<'_>) -> Result<String, ConfigureError> {
        let (section, key) = (question.section, question.key);
        let answer = self.settle(question, |answer| check(section, &[(key, answer)]))?;
        self.document.set(section, key, &answer);
        Ok(answer)
    }

    fn modules(&mut self) -> Result<(), ConfigureError> {
        let (label, about, key) = ("Module search path", MODULES, "module_path");
        let question = Question { label, about, section: GLOBAL, key, fallback: NOTHING, given: None };
        let answer = self.settle(&question, writable)?;
        if answer.eq_ignore_ascii_case(NOTHING) {
            self.document.remove(GLOBAL, |name| name.eq_ignore_ascii_case(key));
        } else {
            self.document.set(GLOBAL, key, &answer);
        }
        Ok(())
    }

    fn plugin(&mut self, plugin: Plugin, label: &'static str, about: &'static str) -> Result<(), ConfigureError> {
        let key = plugin.key();
        let given = self.given.listener.as_deref().filter(|_| plugin == Plugin::Listener).map(|list| (key, list));
        let question = Question { label, about, section: GLOBAL, key, fallback: plugin.usual(), given };
        let answer = self.settle(&question, |answer| check(GLOBAL, &[(key, answer)]))?;
        self.document.set(GLOBAL, key, &answer);
        Ok(())
    }

    /// The backend that the file names by now.
    fn backend(&self) -> Backend {
        let named = self.document.get(GLOBAL, Plugin::Backend.key()).unwrap_or_default();
        if named.eq_ignore_ascii_case(Backend::Cpg.name()) { Backend::Cpg } else { Backend::Libvirt }
    }

    /// Asks for the first URI; further ones stay. URIs from the command line replace all.
    fn uris(&mut self) -> Result<(), ConfigureError> {
        let number = |key: &str| {
            let digits = key.get(3..).filter(|_| key.get(..3).is_some_and(|uri| uri.eq_ignore_ascii_case("uri")))?;
            if digits.is_empty() { Some(None) } else { digits.parse::<u64>().ok().map(Some) }
        };
        let section = self.backend().section();
        if !self.given.uris.is_empty() {
            self.document.remove(section, |key| number(key).is_some());
            for (index, uri) in self.given.uris.iter().enumerate() {
                let key = if index == 0 { "uri".to_owned() } else { format!("uri{index}") };
                self.document.set(section, &key, uri);
            }
            return Ok(());
        }
        let keys = self.document.values(section).filter_map(|(key, value)| Some((number(key)?, key.to_owned(), value)));
        let mut keys: Vec<_> = keys.map(|(number, key, value)| (number, key, value.to_owned())).collect();
        keys.sort();
        let key = keys.first().map_or("uri", |(_, key, _)| key.as_str());
        let (label, about, fallback) = ("Libvirt URI", URI, config::DEFAULT_URI);
        let question = Question { label, about, section, key, fallback, given: None };
        let answer = self.settle(&question, check_uri)?;
        self.document.set(section, key, &answer);
        for (_, key, uri) in keys.iter().skip(1) {
            if !self.given.yes {
                self.dialogue.say(&format!("Also asked, as the file says: {uri} (`{key}`)"))?;
            }
        }
        Ok(())
    }
}
