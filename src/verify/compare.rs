//! Lists everything that is stored of a snapshot and compares it with the manifest, without reading contents.

use std::collections::{BTreeMap, BTreeSet};

use super::{ProblemKind, SealedManifest, Verifier};
use crate::error::Result;
use crate::manifest::SealId;
use crate::store::StrangeKind;

impl Verifier {
    /// Finds all fragments and namespaces; returns the namespaces.
    pub(super) fn survey(
        &mut self,
        sealed: Option<&SealedManifest>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<BTreeSet<Box<str>>> {
        let survey = self.store.survey(sealed.map(|sealed| &sealed.manifest), interrupt)?;
        for strange in survey.strange {
            let (kind, text) = match strange.kind {
                // Its contents are still read, and will tell more.
                StrangeKind::NotExamined => continue,
                StrangeKind::Unreadable | StrangeKind::Changed => {
                    let kind = match strange.kind {
                        StrangeKind::Changed => ProblemKind::Changed,
                        _ => ProblemKind::Unreadable,
                    };
                    let context = format!("cannot open the snapshot {}", self.store.location());
                    let text = strange.refusal.map(|error| error.text_without(context)).unwrap_or_default();
                    self.problem(&strange.path, kind, text);
                    continue;
                }
                StrangeKind::NotUtf8 => (ProblemKind::NotUtf8, "its name is not UTF-8"),
                StrangeKind::Link => (ProblemKind::Link, "it is a symbolic link, which vmsnap never follows"),
                StrangeKind::SpecialFile => (ProblemKind::SpecialFile, "it is neither a file nor a directory"),
                StrangeKind::ReservedName => (
                    ProblemKind::Extra,
                    "its name is reserved for vmsnap; if a killed process left it, clean() removes it",
                ),
                StrangeKind::BadName => (ProblemKind::Extra, "a snapshot cannot contain this name"),
            };
            self.problem(&strange.path, kind, text);
        }
        self.found = survey.fragments.into_iter().map(|stored| (stored.path.into(), stored.stored_size)).collect();
        Ok(survey.namespaces.into_iter().map(|path| String::from(path).into_boxed_str()).collect())
    }

    /// Compares the manifest with everything that was found.
    pub(super) fn compare(&mut self, sealed: &SealedManifest, namespaces: &BTreeSet<Box<str>>) {
        let SealedManifest { manifest, digest } = sealed;
        self.report.seal = Some(SealId { snapshot_id: manifest.snapshot_id, seal_digest: *digest });
        let said: BTreeMap<_, _> =
            self.report.problems.iter().map(|problem| (problem.path.clone(), problem.kind)).collect();
        let mut problems = Vec::new();
        for path in manifest.fragments.keys().filter(|path| !self.found.contains_key(*path)) {
            problems.push((path.clone(), ProblemKind::Missing, "the manifest lists it, but it does not exist"));
        }
        for path in self.found.keys().filter(|path| !manifest.fragments.contains_key(*path)) {
            problems.push((path.clone(), ProblemKind::Extra, "the manifest does not list it"));
        }
        for path in manifest.namespaces.difference(namespaces) {
            let text = "the manifest lists the namespace, but it does not exist";
            problems.push((path.to_string(), ProblemKind::Missing, text));
        }
        for path in namespaces.difference(&manifest.namespaces) {
            problems.push((path.to_string(), ProblemKind::Extra, "the manifest does not list this namespace"));
        }
        for (path, kind, text) in problems {
            // If a special file is at this path, or a header there was changed, that was reported already.
            if !said.contains_key(&path) {
                self.problem(&path, kind, text);
            }
            if manifest.fragments.contains_key(&path) || self.found.contains_key(&path) {
                self.report.fragments.insert(path, Some(kind));
            }
        }
    }
}
