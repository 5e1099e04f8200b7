use std::fmt::Write as _;
use std::fs;

use anyhow::Context as _;

use crate::cli::RenderArgs;
use crate::env::Environment;
use crate::host::Host;
use crate::keys::KEYS;
use crate::render::{binary, job_script};
use crate::report::{Outcome, print_line};
use crate::resolve::{self, Resolved};
use crate::rundir::find_run;
use crate::supervise::narrate;

pub(crate) fn run(args: &RenderArgs) -> Outcome {
    let resolved = resolve::render(args, &Environment::of_process(), &Host::probe()?)?;
    if args.explain {
        return print_line(explain(&resolved).trim_end()).map(drop);
    }
    let Resolved { spec, run_root, .. } = &resolved;
    let site = spec.site.as_ref().context("render resolves clusters with Slurm only")?;
    let script = job_script(spec, site, &run_root.join(&spec.name), &binary(site)?)?;
    if let Some(selector) = &args.diff {
        let earlier = find_run(selector)?.path().join("job.sbatch");
        let earlier = fs::read_to_string(&earlier).with_context(|| format!("cannot read {}", earlier.display()))?;
        return print_line(diff(&earlier, &script).trim_end()).map(drop);
    }
    let Some(folder) = &args.output else {
        return print_line(script.trim_end()).map(drop);
    };
    let lock = toml::to_string(spec).context("cannot write the run down")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, text) in [("job.sbatch", &script), ("run.lock.toml", &lock)] {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        narrate(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// Every key that is set, then every variable of the network, each with its source.
fn explain(resolved: &Resolved) -> String {
    let mut rows: Vec<(String, String, String)> = resolved
        .settings
        .iter()
        .map(|(key, value, source)| (key.into(), value.to_string(), source.to_string()))
        .collect();
    let unset = KEYS.iter().filter(|key| resolved.settings.source(key.name).is_none());
    let unset = unset.filter(|key| !rows.iter().any(|(name, ..)| name.starts_with(&format!("{}.", key.name))));
    let unset: Vec<_> =
        unset.map(|key| (key.name.to_owned(), key.default.to_owned(), "<default>".to_owned())).collect();
    rows.extend(unset);
    let site = resolved.spec.site.iter();
    rows.extend(
        site.flat_map(|site| &site.fabric)
            .map(|variable| (format!("${}", variable.name), format!("{:?}", variable.value), variable.source.clone())),
    );
    rows.sort();
    let width = |column: fn(&(String, String, String)) -> usize| rows.iter().map(column).max().unwrap_or(0);
    let (keys, values) = (width(|row| row.0.len()), width(|row| row.1.len()).min(48));
    let mut text = String::new();
    for (key, value, source) in &rows {
        // Writing to a String cannot fail.
        _ = writeln!(text, "{key:keys$}  {value:values$}  {source}");
    }
    text
}

/// Lines that only one of the two has, marked `-` and `+`; nothing if they are equal.
fn diff(old: &str, new: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    // Lengths of the longest common subsequences of what is left of both; scripts have some dozens of lines.
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] =
                if old[i] == new[j] { common[i + 1][j + 1] + 1 } else { common[i + 1][j].max(common[i][j + 1]) };
        }
    }
    let (mut i, mut j, mut text) = (0, 0, String::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            _ = writeln!(text, "-{}", old[i]);
            i += 1;
        } else {
            _ = writeln!(text, "+{}", new[j]);
            j += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::diff;

    #[test]
    fn only_what_differs_is_shown() {
        assert_eq!(diff("a\nb\nc\n", "a\nx\nc\nd\n"), "-b\n+x\n+d\n");
        assert_eq!(diff("a\n", "a\n"), "");
        assert_eq!(diff("", "a\n"), "+a\n");
    }
}
