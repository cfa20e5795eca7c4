//! A first look at a section: which keys it sets, which of its sections count, and what in it means nothing.

use super::error::{ConfigError, Mistake, Mistakes};
use super::place::{Place, Source};
use super::raw::{Assignment, Item, Section, Span, Spanned, clip};
use super::warning::{Doubt, Warnings};

/// How many mistakes are reported at once; the rest shows when these are mended.
const MAX_MISTAKES: usize = 20;

/// What is found while a file is resolved.
pub(super) struct Findings<'s> {
    source: &'s Source<'s>,
    mistakes: Vec<(Span, Mistake)>,
    warnings: Warnings,
}

impl<'s> Findings<'s> {
    pub(super) fn new(source: &'s Source<'s>, warnings: Warnings) -> Self {
        Self { source, mistakes: Vec::new(), warnings }
    }

    /// Something wrong.
    pub(super) fn mistake(&mut self, span: &Span, mistake: Mistake) {
        if self.mistakes.len() < MAX_MISTAKES {
            self.mistakes.push((span.clone(), mistake));
        }
    }

    /// Something doubtful.
    pub(super) fn doubt(&mut self, span: &Span, doubt: impl FnOnce(&Source<'_>) -> Doubt) {
        // Finding a place costs time: not for what nobody will see.
        if self.warnings.is_full() {
            self.warnings.leave_out();
        } else {
            self.warnings.push(Some(self.source.place(span)), doubt(self.source));
        }
    }

    /// The warnings if nothing is wrong, the mistakes in the file's order otherwise.
    pub(super) fn conclude(mut self) -> Result<Warnings, ConfigError> {
        self.warnings.sort();
        if self.mistakes.is_empty() {
            return Ok(self.warnings);
        }
        self.mistakes.sort_by_key(|(span, _)| span.start);
        let placed = |(span, mistake): (Span, Mistake)| -> (Place, Mistake) { (self.source.place(&span), mistake) };
        let list = self.mistakes.into_iter().map(placed).collect();
        Err(ConfigError::Mistakes(Mistakes { list, warnings: self.warnings }))
    }
}

/// What a section may contain.
pub(super) struct Scope {
    /// Keys of which the last one counts.
    pub(super) keys: &'static [&'static str],
    /// Keys that count each time.
    pub(super) lists: &'static [&'static str],
    /// Keys that may have a number behind them, and count each time.
    pub(super) numbered: &'static [&'static str],
    /// Sections of which the last one counts.
    pub(super) sections: &'static [&'static str],
    /// Sections that count each time.
    pub(super) repeated: &'static [&'static str],
}

impl Scope {
    fn knows_key(&self, name: &str) -> bool {
        is_one_of(self.keys, name) || self.is_list(name)
    }

    fn is_list(&self, name: &str) -> bool {
        is_one_of(self.lists, name) || is_one_of(self.numbered, name.trim_end_matches(|c: char| c.is_ascii_digit()))
    }

    fn knows_section(&self, name: &str) -> bool {
        is_one_of(self.sections, name) || is_one_of(self.repeated, name)
    }

    fn meant(&self, name: &str) -> Option<&'static str> {
        let known = [self.keys, self.lists, self.numbered, self.sections, self.repeated];
        nearest(name, known.into_iter().flatten().copied())
    }
}

fn is_one_of(known: &[&str], name: &str) -> bool {
    known.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// The known word that `name` is probably a misspelling of.
fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    // Nothing known is nearly as long, and the comparison's time grows with the length.
    if name.len() > 40 {
        return None;
    }
    let name = name.to_ascii_lowercase();
    let tolerance = |known: &str| (known.len() / 3).max(1);
    known
        .filter(|known| known.len().abs_diff(name.len()) <= tolerance(known))
        .map(|known| (strsim::damerau_levenshtein(&name, known), known))
        .filter(|(distance, known)| *distance <= tolerance(known))
        .min()
        .map(|(_, known)| known)
}

/// A section's contents, sorted by what counts. Names are the ones of its scope, lower case.
pub(super) struct Surveyed<'i> {
    values: Vec<&'i Assignment<'i>>,
    sections: Vec<&'i Section<'i>>,
}

impl<'i> Surveyed<'i> {
    /// Sorts the contents of a section; what is unknown, overruled or of the wrong kind is reported.
    pub(super) fn new(items: &'i [Item<'i>], scope: &Scope, findings: &mut Findings<'_>) -> Self {
        let mut found = Self { values: Vec::new(), sections: Vec::new() };
        // From the end, so that what counts comes first and each one before it is known to be overruled.
        for item in items.iter().rev() {
            match item {
                Item::Value(value) => found.value(value, scope, findings),
                Item::Section(section) => found.section(section, scope, findings),
            }
        }
        found.values.reverse();
        found.sections.reverse();
        found
    }

    fn value(&mut self, item: &'i Assignment<'i>, scope: &Scope, findings: &mut Findings<'_>) {
        let name = item.key.value;
        if scope.knows_section(name) {
            findings.mistake(&item.key.span, Mistake::SectionExpected(clip(name)));
        } else if !scope.knows_key(name) {
            if is_one_of(&["ip", "uuid"], name) {
                findings.mistake(&item.key.span, Mistake::OutsideGroup(clip(name)));
            } else if is_one_of(&["group", "groups"], name) {
                findings.mistake(&item.key.span, Mistake::Misplaced(clip(name)));
            } else {
                findings.doubt(&item.key.span, |_| Doubt::UnknownKey { name: clip(name), meant: scope.meant(name) });
            }
        } else {
            // What counts each time is not even looked for: there may be thousands.
            match if scope.is_list(name) { None } else { self.get(name) } {
                Some(later) => overruled(&item.key, &later.key, findings),
                None => self.values.push(item),
            }
        }
    }

    fn section(&mut self, item: &'i Section<'i>, scope: &Scope, findings: &mut Findings<'_>) {
        let name = item.name.value;
        if scope.knows_key(name) {
            findings.mistake(&item.name.span, Mistake::ValueExpected(clip(name)));
        } else if !scope.knows_section(name) {
            let meant = scope.meant(name);
            // A restriction that would restrict nothing is the one misspelling that must not pass.
            if meant == Some("groups") || is_one_of(&["group", "groups"], name) || restricts(&item.items) {
                findings.mistake(&item.name.span, Mistake::Misplaced(clip(name)));
            } else {
                findings.doubt(&item.name.span, |_| Doubt::UnknownSection { name: clip(name), meant });
            }
        } else {
            match if is_one_of(scope.repeated, name) { None } else { self.last_section(name) } {
                Some(later) => overruled(&item.name, &later.name, findings),
                None => self.sections.push(item),
            }
        }
    }

    /// The value that counts for a key.
    pub(super) fn get(&self, key: &str) -> Option<&'i Assignment<'i>> {
        self.values.iter().find(|value| value.key.value.eq_ignore_ascii_case(key)).copied()
    }

    /// The section of this name that counts.
    pub(super) fn last_section(&self, name: &str) -> Option<&'i Section<'i>> {
        self.sections.iter().find(|section| section.name.value.eq_ignore_ascii_case(name)).copied()
    }

    /// The values that count, in the file's order.
    pub(super) fn values(&self) -> impl Iterator<Item = &'i Assignment<'i>> {
        self.values.iter().copied()
    }

    /// The sections that count, in the file's order.
    pub(super) fn sections(&self) -> impl Iterator<Item = &'i Section<'i>> {
        self.sections.iter().copied()
    }
}

fn overruled(earlier: &Spanned<&str>, later: &Spanned<&str>, findings: &mut Findings<'_>) {
    findings.doubt(&earlier.span, |source| {
        let line = source.place(&later.span).line();
        Doubt::Overruled { name: clip(earlier.value), line }
    });
}

/// Whether anything in here reads like a part of a group, at any depth.
fn restricts(items: &[Item<'_>]) -> bool {
    const RESTRICTING: &[&str] = &["group", "groups", "ip", "uuid"];
    items.iter().any(|item| match item {
        Item::Value(value) => is_one_of(RESTRICTING, value.key.value),
        Item::Section(section) => is_one_of(RESTRICTING, section.name.value) || restricts(&section.items),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspellings_are_recognised_and_other_words_are_not() {
        let known = || ["key_file", "hash", "port", "uri"].into_iter();
        for (written, meant) in [
            ("keyfile", Some("key_file")),
            ("Key-File", Some("key_file")),
            ("hahs", Some("hash")),
            ("prot", Some("port")),
            ("url", Some("uri")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(written, known()), meant, "{written}");
        }
        assert_eq!(nearest(&"key_file".repeat(1000), known()), None);
    }
}
