//! Everything in an archive between the contents of the fragments: headers, padding and end.

use std::time::{Duration, UNIX_EPOCH};

use super::member::{END_BYTES, MemberKind};
use super::{Archive, Opened, read_at_most, wrong_length};
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::name::SnapshotPath;
use crate::store::{StoredFragment, Strange, StrangeKind, Survey};

/// The padding of a member is shorter than a block, and the end is as long as two.
const MAX_ZEROS: usize = 1024;

impl Archive {
    /// Lists the members. With the manifest, their headers and the zeros between them are compared with its layout;
    /// without it, the headers are all that is known.
    pub(crate) fn survey(
        &self,
        manifest: Option<&Manifest>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Survey> {
        let opened = self.opened()?;
        let mut survey = Survey::default();
        let whole = |error: Error| {
            let name = self.location.path().file_name().unwrap_or_default();
            let context = format!("cannot open the snapshot {}", self.location);
            Strange {
                path: name.to_string_lossy().into_owned(),
                kind: StrangeKind::Changed,
                refusal: Some(error.context(context)),
            }
        };
        let listed = match manifest {
            Some(manifest) => opened.compare(manifest, &mut survey, interrupt),
            None => opened.list(&mut survey),
        };
        match listed {
            Err(error) if error.is_corrupt() => survey.strange.push(whole(error)),
            listed => listed?,
        }
        Ok(survey)
    }
}

impl Opened {
    fn list(&self, survey: &mut Survey) -> Result<()> {
        let scan = self.scan()?;
        for path in &scan.namespaces {
            survey.namespaces.push(path.clone().try_into()?);
        }
        for (path, (_, size)) in &scan.fragments {
            survey.fragments.push(self.found(path.clone().try_into()?, *size));
        }
        Ok(())
    }

    fn compare(
        &self,
        manifest: &Manifest,
        survey: &mut Survey,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let layout = self.layout(manifest)?;
        for member in layout.members() {
            interrupt()?;
            let data = member.data();
            let checked = self.check_headers(&member);
            let is_found = checked.is_ok();
            let padding = self.check_zeros(data.end, member.end().min(self.size.max(data.end)), "the padding after it");
            if let Err(error) = checked.and(padding) {
                if !error.is_corrupt() {
                    return Err(error);
                }
                let path = member.path.to_owned();
                survey.strange.push(Strange { path, kind: StrangeKind::Changed, refusal: Some(error) });
            }
            if member.start < self.shape.end {
                continue;
            }
            let path = SnapshotPath::try_from(member.path.to_owned())?;
            match member.kind {
                MemberKind::Namespace => survey.namespaces.push(path),
                MemberKind::File if is_found => {
                    let stored = self.size.saturating_sub(data.start).min(member.size);
                    survey.fragments.push(self.found(path, stored));
                }
                MemberKind::File => {}
            }
        }
        let total = layout.total_bytes();
        if self.size == total {
            self.check_zeros(total - END_BYTES, total, "the end of the archive")
        } else {
            Err(wrong_length(self.size, total))
        }
    }

    /// A fragment with the time at which the snapshot was sealed.
    fn found(&self, path: SnapshotPath, stored_size: u64) -> StoredFragment {
        let modified = UNIX_EPOCH + Duration::from_secs(self.shape.mtime);
        StoredFragment { path, stored_size, modified, finished: true }
    }

    fn check_zeros(&self, from: u64, to: u64, name: &str) -> Result<()> {
        let mut zeros = [0; MAX_ZEROS];
        let length = usize::try_from(to - from).map_or(MAX_ZEROS, |length| length.min(MAX_ZEROS));
        let read = read_at_most(&self.file, &mut zeros[..length], from)
            .map_err(|error| Error::io(format!("{name} cannot be read"), error))?;
        if read == length && zeros.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err(Error::corrupt(format!("{name} is not zero: it was changed")))
        }
    }
}
